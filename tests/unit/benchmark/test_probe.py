"""`ubgen-bench probe` on a small problem."""

import json
from pathlib import Path

import pytest

from ubgen.benchmark import bench_probe
from ubgen.core.errors import UserError


def test_both_sides_are_measured(tmp_path: Path) -> None:
    result = bench_probe(samples=120, dim=12, classes=6, trials=4, peer_trials=2)
    assert list(result.peers) == ["scikit-learn", "scikit-learn, tol=1e-12"]
    for peer, fits in result.peers.items():
        assert len(fits) == 2
        assert result.ratio(peer) > 0
    tried = dict(result.search["trials"])
    for fit in result.peers["scikit-learn, tol=1e-12"]:
        assert abs(fit.validation - tried[fit.C]) <= 1 / 30
    result.write(tmp_path)
    assert len(json.loads((tmp_path / "probe.json").read_text())["search"]["trials"]) == 4
    assert "| ours |" in (tmp_path / "probe.md").read_text()
    with pytest.raises(UserError, match="twice the classes"):
        bench_probe(samples=10, classes=6)
