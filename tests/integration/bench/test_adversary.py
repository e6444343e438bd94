"""The report on the adversary's gradient, in a run that is too short to say anything."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[3] / "bench/adversary.py"


def test_every_kind_of_discriminator_is_looked_at(tmp_path: Path) -> None:
    size = ["--batches", "1", "--seeds", "1", "--updates", "2"]
    run = subprocess.run(
        [sys.executable, SCRIPT, *size, "--out", tmp_path], capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    looks = json.loads((tmp_path / "adversary.json").read_text())
    assert [(look["kind"]["features"], look["kind"]["hidden"]) for look in looks] == [
        (kind, hidden) for kind in ("raw", "normalised", "centred") for hidden in (3, 64)
    ]
    assert all(
        look["loss"] > 0 and look["gradient"] > 0 and abs(look["away_from_bias"]) <= 1 for look in looks
    )
    assert "| centred | 64 | 2 |" in (tmp_path / "adversary.md").read_text()
