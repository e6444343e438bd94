"""Worker processes that die: their shards are begun again by others, and a run that gets nowhere ends."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("dying_workers.py")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("dying")


@pytest.fixture(scope="module")
def told(root: Path) -> dict[str, Any]:
    return run(root)


def run(*arguments: object) -> dict[str, Any]:
    result = subprocess.run(
        [sys.executable, SCRIPT, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def dataset_bytes(out: Path) -> dict[str, bytes]:
    """Shards, ledger and what else does not tell of times."""
    files = (p for p in out.iterdir() if p.is_file())
    names = {p.name: p.read_bytes() for p in files}
    return {
        n: data
        for n, data in names.items()
        if n not in ("manifest.json", "run.json", "throughput.png", ".lock")
    }


def test_a_killed_worker_is_replaced_and_two_continue_what_one_began(
    told: dict[str, Any], root: Path
) -> None:
    (line,) = told["said"]
    assert re.fullmatch(r"worker [12] died \(status -9\); its [1-9] shards are begun again", line)
    assert 0 < told["made"] < told["of"]
    assert dataset_bytes(root / "replaced") == dataset_bytes(root / "undisturbed")


@pytest.mark.slow
def test_one_that_dies_before_it_is_answered_is_replaced(tmp_path: Path) -> None:
    (line,) = run(tmp_path, "unanswered")["unanswered"]
    assert re.fullmatch(r"worker [12] died \(status -9\); its [1-9] shards are begun again", line)
    assert dataset_bytes(tmp_path / "unanswered") == dataset_bytes(tmp_path / "undisturbed")


def test_parts_continue_what_one_worker_began(told: dict[str, Any], root: Path) -> None:
    assert told["complete"] == [False, True]
    assert dataset_bytes(root / "parts") == dataset_bytes(root / "undisturbed")


def test_three_deaths_without_a_shard_end_the_run(told: dict[str, Any], root: Path) -> None:
    *said, error = told["hopeless"]
    assert len(said) == 2
    assert all(
        re.fullmatch(r"worker \d died \(status -9\); its 0 shards are begun again", line) for line in said
    )
    assert error.startswith(
        "error: 3 workers died one after the other (the last with status -9) and no shard was"
    )
    assert not list((root / "hopeless").glob("*shard-*"))
