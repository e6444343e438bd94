"""The same dataset on a Ray cluster, whatever becomes of its workers and its head."""

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from ubgen.export import Exported
from ubgen.synth import SynthConfig
from ubgen.synth.synthesise import synthesise

pytest.importorskip("ray")

MARK = "UBGEN_TEST_RUN"


@dataclass
class Run:
    """ubgen-synth --executor ray in a process of its own; `mark` is in the environment of all that it starts."""

    config: SynthConfig
    process: subprocess.Popen[str]
    mark: str

    def wait(self) -> tuple[int, str]:
        try:
            output, _ = self.process.communicate(timeout=150)
        finally:
            for process in self.processes(""):
                os.kill(process, signal.SIGKILL)
        return self.process.returncode, output

    def processes(self, name: str) -> list[int]:
        """Those that this run started, by what their command line contains."""
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) in (os.getpid(), self.process.pid):
                continue
            try:
                marked = f"{MARK}={self.mark}".encode() in (entry / "environ").read_bytes()
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if marked and name in command:
                found.append(int(entry.name))
        return found

    def until(self, condition: Callable[[], object]) -> None:
        end = time.monotonic() + 120
        while not condition():
            assert self.process.poll() is None, self.process.communicate()[0]
            assert time.monotonic() < end
            time.sleep(0.01)


def start(config: SynthConfig) -> Run:
    options = {
        "engine": config.engine,
        "classes": config.classes,
        "per-class": config.per_class,
        "out": config.out,
        "batch": config.batch,
        "steps": config.steps,
        "shard-size": config.shard_size,
        "executor": "ray",
        "workers": 2,
    }
    mark = uuid.uuid4().hex
    command = [sys.executable, "-c", "from ubgen.cli.synth import main; main()"]
    command += [part for name, value in options.items() for part in (f"--{name}", str(value))]
    environment = {**os.environ, MARK: mark, "OMP_NUM_THREADS": "1", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    return Run(config, process, mark)


def shards(out: str) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(Path(out).glob("shard-*"))}


@pytest.fixture(scope="module")
def config(exported: Exported, class_file: str, tmp_path_factory: pytest.TempPathFactory) -> SynthConfig:
    out = str(tmp_path_factory.mktemp("ray") / "local")
    return SynthConfig(exported.path, class_file, per_class=36, out=out, batch=4, steps=12, shard_size=9)


@pytest.fixture(scope="module")
def wanted(config: SynthConfig) -> dict[str, bytes]:
    synthesise(config)
    return shards(config.out)


def on_ray(config: SynthConfig, out: Path) -> Run:
    return start(SynthConfig(**{**vars(config), "out": str(out)}))


def test_a_killed_worker_costs_nothing(config: SynthConfig, wanted: dict[str, bytes], tmp_path: Path) -> None:
    run = on_ray(config, tmp_path / "out")
    run.until(lambda: list(Path(run.config.out).glob("shard-*.json")))
    workers = run.processes("ray::Worker")
    assert workers
    os.kill(workers[0], signal.SIGKILL)
    status, output = run.wait()
    assert status == 0, output
    assert "is gone; its" in output
    assert shards(run.config.out) == wanted


@pytest.mark.slow
def test_a_killed_head_and_a_fresh_one(config: SynthConfig, wanted: dict[str, bytes], tmp_path: Path) -> None:
    run = on_ray(config, tmp_path / "out")
    run.until(lambda: list(Path(run.config.out).glob("shard-*.json")))
    assert run.processes("gcs_server")
    for process in run.processes(""):  # the machine that the head was on, with its workers
        os.kill(process, signal.SIGKILL)
    status, output = run.wait()
    assert status == 2, output
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert "the Ray cluster went away" in line or "the node that hands out shards is gone" in line
    assert line.endswith("Run the same command again to continue")
    assert "Traceback" not in output
    assert not (tmp_path / "out" / "manifest.json").exists()
    kept = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("shard-*.tar")}
    again = on_ray(config, tmp_path / "out")
    status, output = again.wait()
    assert status == 0, output
    assert shards(run.config.out) == wanted
    assert any(p.stat().st_mtime_ns == time for p, time in kept.items())
