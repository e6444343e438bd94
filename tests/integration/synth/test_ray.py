"""What may happen to a run on a Ray cluster: a full disk, machines that come and go."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from ubgen.synth.synthesise import synthesise

pytest.importorskip("ray")


ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_worker_niceness": "0",  # 15 by default: beside other tests they would hardly run
}


def told(script: str, root: Path) -> tuple[Any, str]:
    """The last line that a script beside this file printed (Ray prints too), and its standard error."""
    result = subprocess.run(
        [sys.executable, Path(__file__).with_name(script), root],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, **ENVIRONMENT},
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1]), result.stderr


def shards(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.glob("*shard-*")}


@pytest.mark.slow
def test_a_full_disk_ends_the_run_with_one_line_and_it_continues(
    stand_ins: ModuleType, tmp_path: Path
) -> None:
    settings = stand_ins.config(tmp_path / "local", stand_ins.no_engine(tmp_path))
    synthesise(settings, open_source=lambda *_: stand_ins.FromIdentities())
    (full, continued), stderr = told("full_disk_on_ray.py", tmp_path)
    assert full["status"] == 2
    assert "Traceback" not in stderr
    (line,) = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: the disk is full ({tmp_path}/out/shard-00000")
    assert line.endswith("free some space and run the same command again to continue")
    assert 0 < len(full["finished"]) < len(continued["finished"])
    assert continued["status"] == 0
    assert shards(tmp_path / "out") == shards(tmp_path / "local")  # and no temporary files


@pytest.mark.slow
def test_a_machine_joins_and_is_taken_away(stand_ins: ModuleType, tmp_path: Path) -> None:
    settings = replace(
        stand_ins.config(tmp_path / "local", stand_ins.no_engine(tmp_path)), per_class=30, shard_size=8
    )
    synthesise(settings, open_source=lambda *_: stand_ins.FromIdentities())
    found, _ = told("nodes_on_ray.py", tmp_path)
    alone, finished = found["shards"]
    assert 0 < alone < finished
    first, *others = found["said"]  # workers that were sent to the machine as it went
    assert re.fullmatch(r"worker 2 is gone; its [1-9][0-9]* shards are begun again", first)
    assert all(re.fullmatch(r"worker \d is gone; its 0 shards are begun again", line) for line in others)
    assert shards(tmp_path / "out") == shards(tmp_path / "local")
