"""Whatever moment a run is killed at, what it becomes in the end is the dataset of an undisturbed one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ubgen.dataset import open_dataset

SCRIPT = Path(__file__).with_name("killed_runs.py")


def dataset_bytes(out: Path) -> dict[str, bytes]:
    """All but the manifest, the picture of the speed, and figures that were not deleted, which depend on times."""
    files = (p for p in out.rglob("*") if p.is_file() and not p.name.startswith("speed-"))
    names = {p.relative_to(out).as_posix(): p.read_bytes() for p in files}
    return {
        n: data
        for n, data in names.items()
        if n not in ("manifest.json", "run.json", "throughput.png", ".lock")
    }


@pytest.mark.parametrize("kills", [4, pytest.param(50, marks=pytest.mark.slow)])
def test_kills_change_nothing(tmp_path: Path, kills: int) -> None:
    command = [sys.executable, SCRIPT, tmp_path, str(kills), "20"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
    assert result.returncode == 0, result.stderr
    told = json.loads(result.stdout)
    assert told["killed"] == kills
    assert len({round(moment, 2) for moment in told["moments"]}) > kills / 5
    whole = dataset_bytes(tmp_path / "undisturbed")
    assert len([name for name in whole if name.endswith(".tar")]) >= 5
    samples = open_dataset(tmp_path / "undisturbed")
    assert any(s.meta["identity"]["attempt"] for s in samples)
    for number in range(told["datasets"]):
        assert dataset_bytes(tmp_path / f"killed-{number:03d}") == whole
