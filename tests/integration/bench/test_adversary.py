"""The bench of the adversary's gradient, in a run that is too short to say anything."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[3] / "bench/adversary.py"


def test_every_kind_of_discriminator_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("adversary", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "adversary", script)
    spec.loader.exec_module(script)
    size = ["--batches", "1", "--steps", "4", "--fair", "500", "--seeds", "1", "--updates", "2"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *size, "--out", str(tmp_path)])
    script.main()
    looks = json.loads((tmp_path / "adversary.json").read_text())
    assert [(look["kind"]["features"], look["kind"]["hidden"]) for look in looks] == [
        (kind, hidden) for kind in ("raw", "normalised") for hidden in (3, 64)
    ]
    assert all(
        look["loss"] > 0 and look["gradient"] > 0 and abs(look["away_from_bias"]) <= 1 for look in looks
    )
    assert "| normalised | 64 | 2 |" in (tmp_path / "adversary.md").read_text()
