"""A full disk, met by workers of a Ray cluster."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from ubgen.synth import synthesise

pytest.importorskip("ray")

SCRIPT = Path(__file__).with_name("full_disk_on_ray.py")


def shards(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.glob("*shard-*")}


def test_a_full_disk_ends_the_run_with_one_line_and_it_continues(
    stand_ins: ModuleType, tmp_path: Path
) -> None:
    engine = tmp_path / "engine"
    engine.mkdir()
    about = {"stage": "export", "engine": {"key": "sha256:none"}, "inputs": {}}
    (engine / "manifest.json").write_text(json.dumps(about), encoding="utf-8")
    synthesise(stand_ins.config(tmp_path / "local", engine), chain=lambda *_: stand_ins.FromIdentities())
    result = subprocess.run(
        [sys.executable, SCRIPT, tmp_path],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"},
    )
    assert result.returncode == 0, result.stderr
    full, continued = json.loads(result.stdout)
    assert full["status"] == 2
    assert "Traceback" not in result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: the disk is full ({tmp_path}/out/shard-00000")
    assert line.endswith("free some space and run the same command again to continue")
    assert 0 < len(full["finished"]) < len(continued["finished"])
    assert continued["status"] == 0
    assert shards(tmp_path / "out") == shards(tmp_path / "local")  # and no temporary files
