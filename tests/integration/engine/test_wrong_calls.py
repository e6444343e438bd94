"""Wrong calls of ubgen-synth and `ubgen-dataset audit`: one line each, and nothing that was there is touched."""

import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ubgen.cli import dataset as dataset_command
from ubgen.cli import synth as synth_command
from ubgen.core.errors import UserError
from ubgen.core.stage import read_manifest
from ubgen.export import Exported
from ubgen.synth import SynthConfig
from ubgen.synth.synthesise import synthesise

Called = tuple[int, str, str]
Call = Callable[..., Called]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Exit status, standard output and standard error of a command's `main`."""

    def call(main: Callable[[], None], *arguments: object) -> Called:
        monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        return int(stop.value.code or 0), *capsys.readouterr()

    return call


@pytest.fixture(scope="module")
def config(exported: Exported, class_file: str, tmp_path_factory: pytest.TempPathFactory) -> SynthConfig:
    out = str(tmp_path_factory.mktemp("finished") / "dataset")
    return SynthConfig(exported.path, class_file, per_class=1, out=out, batch=5, steps=2)


@pytest.fixture(scope="module")
def finished(config: SynthConfig) -> Path:
    synthesise(config)
    return Path(config.out)


def content(out: Path) -> dict[str, bytes]:
    files = (path for path in out.rglob("*") if path.is_file())
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in files}


def assert_one_line(called: Called, start: str) -> None:
    status, out, error = called
    assert (status, out) == (2, "")
    (line,) = error.splitlines()
    assert line.startswith(f"error: {start}")


no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has what is asked for")
WRONG = [
    ("--batch 9999", "--batch 9999: the UNet of this engine takes 1 to"),
    pytest.param("--device cuda", "--device cuda: this machine has no CUDA device", marks=no_gpu),
    ("--device cuda:x", "--device must be"),
    ("--classes no-such-list", "class list 'no-such-list' is neither"),
    ("--prompts no-such-file", "--prompts no-such-file: No such file"),
    ("--engine no-such-engine", "no-such-engine is unfinished or not a ubgen export directory"),
    ("--steps 0", "--steps must be at least 1"),
    ("--min-quality nan", "--min-quality must lie in 1..5"),
]


@pytest.mark.parametrize(("wrong", "start"), WRONG)
def test_a_wrong_option_costs_no_finished_dataset(
    config: SynthConfig, finished: Path, call: Call, wrong: str, start: str
) -> None:
    before = content(finished)
    right = ("--engine", config.engine, "--classes", config.classes, "--per-class", 2, "--out", finished)
    assert_one_line(call(synth_command.main, *right, "--overwrite", *wrong.split()), start)
    assert content(finished) == before


@pytest.mark.parametrize(
    ("wrong", "start"),
    [
        *WRONG,
        ("--executor static", "--executor static and --part go together"),
        ("--executor ray --ray-address 127.0.0.1:1", "--ray-address 127.0.0.1:1: nothing answers there"),
        ("--ray-address auto", "--ray-address needs --executor ray"),
    ],
)
def test_a_wrong_option_leaves_nothing(
    config: SynthConfig, tmp_path: Path, call: Call, wrong: str, start: str
) -> None:
    if "executor ray" in wrong:
        pytest.importorskip("ray")
    out = tmp_path / "out"
    right = ("--engine", config.engine, "--classes", config.classes, "--per-class", 1, "--out", out)
    assert_one_line(call(synth_command.main, *right, *wrong.split()), start)
    assert not out.exists()


def test_a_wrong_directory_is_left_alone(
    config: SynthConfig, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Call
) -> None:
    right = ("--engine", config.engine, "--classes", config.classes, "--per-class", 1, "--out")
    (tmp_path / "README.md").write_text("mine", encoding="utf-8")
    for more in ((), ("--overwrite",)):
        called = call(synth_command.main, *right, tmp_path, *more)
        assert_one_line(called, f"--out: {tmp_path} is not a directory of ubgen-synth (it holds README.md)")
    engine = content(Path(config.engine))
    called = call(synth_command.main, *right, config.engine, "--overwrite")
    assert_one_line(called, f"--out: {config.engine} ")
    assert content(Path(config.engine)) == engine
    monkeypatch.chdir(tmp_path)
    assert_one_line(call(synth_command.main, *right, ""), "--out must name a directory")
    assert content(tmp_path) == {"README.md": b"mine"}
    assert_one_line(
        call(synth_command.main, *right, finished),
        f"{finished} holds a finished run with another configuration",
    )


def test_a_damaged_engine_costs_no_finished_dataset(
    config: SynthConfig, finished: Path, tmp_path: Path
) -> None:
    damaged = Path(shutil.copytree(config.engine, tmp_path / "engine"))
    file = damaged / read_manifest(damaged, "export")["engine"]["networks"]["unet"]["file"]
    file.write_bytes(file.read_bytes() + b"x")
    before = content(finished)
    with pytest.raises(UserError, match="is not the file that was exported"):
        synthesise(replace(config, engine=damaged, overwrite=True))
    assert content(finished) == before


@pytest.mark.parametrize(
    ("wrong", "start"),
    [
        ("--sample -2", "--sample must be at least 1, not -2"),
        ("--sample 0", "--sample must be at least 1, not 0"),
        ("--device gpu", "--device must be"),
        pytest.param("--device cuda", "device 'cuda' is not available", marks=no_gpu),
        ("--engine no-such-engine", "no-such-engine is unfinished or not a ubgen export directory"),
    ],
)
def test_wrong_audits(finished: Path, call: Call, wrong: str, start: str) -> None:
    assert_one_line(call(dataset_command.main, "audit", finished, *wrong.split()), start)


def test_audits_of_what_is_no_dataset_of_ours(finished: Path, tmp_path: Path, call: Call) -> None:
    nothing = call(dataset_command.main, "audit", tmp_path)
    assert_one_line(nothing, f"{tmp_path} is unfinished or not a ubgen synth directory")
    converted = Path(shutil.copytree(finished, tmp_path / "converted"))
    (converted / "run.json").unlink()
    called = call(dataset_command.main, "audit", converted)
    assert_one_line(called, f"{converted} has no run.json of ubgen-synth")
