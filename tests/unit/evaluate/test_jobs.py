"""Results are stored as they come, and never computed twice."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from ubgen.core.console import Report
from ubgen.core.errors import UserError
from ubgen.evaluate.jobs import Job, run_jobs
from ubgen.evaluate.results import Figure, Result, all_stored, predictions

BACKBONE = {"identity": "sha256:aa", "precision": "no", "name": "one"}


def result(dataset: str, correct: Sequence[bool] = (True, False)) -> Result:
    names = [f"{i}.jpg" for i in range(len(correct))]
    columns = {"sample": names, "label": names, "predicted": names, "correct": list(correct)}
    value = 100 * float(np.mean(correct))
    return Result(
        "transfer",
        dataset,
        {"top-1": Figure(value, 0.0, 100.0)},
        {"images": np.int64(2)},
        {"C": np.float32(1)},
        columns,
    )


class Work:
    """Counts its calls; the last may fail."""

    def __init__(self, dataset: str, fails: bool = False) -> None:
        self.dataset, self.fails, self.calls = dataset, fails, 0

    def __call__(self, report: Report) -> Result:
        self.calls += 1
        if self.fails:
            raise KeyboardInterrupt
        return result(self.dataset)


def run(
    out: Path, works: Sequence[Work], seeds: int = 5, overwrite: bool = False, backbone: object = None
) -> list[Result]:
    jobs = [Job("transfer", work.dataset, {"seeds": seeds}, work) for work in works]
    return run_jobs(
        jobs,
        out,
        backbone or BACKBONE,
        write_tables=lambda out, results: None,
        overwrite=overwrite,
    )


def test_what_is_finished_is_kept_when_the_next_one_is_interrupted(tmp_path: Path) -> None:
    first, second = Work("dtd"), Work("pets", fails=True)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, [first, second])
    assert not (tmp_path / "manifest.json").exists()
    second.fails = False
    found = run(tmp_path, [first, second])
    assert (first.calls, second.calls) == (1, 2)
    assert [r.dataset for r in found] == ["dtd", "pets"]
    assert found[0].main == Figure(50.0, 0.0, 100.0)
    summary = json.loads((tmp_path / "results.json").read_text())
    assert [r["dataset"] for r in summary["results"]] == ["dtd", "pets"]
    assert summary["results"][0]["counts"] == {"images": 2}
    assert predictions(tmp_path, "transfer-dtd")["correct"].tolist() == [True, False]


def test_a_finished_directory_takes_in_more_datasets(tmp_path: Path) -> None:
    first, second = Work("dtd"), Work("pets")
    run(tmp_path, [first])
    run(tmp_path, [first])
    run(tmp_path, [first, second])
    assert (first.calls, second.calls) == (1, 1)
    assert [r.dataset for r in all_stored(tmp_path)] == ["dtd", "pets"]
    assert (tmp_path / "manifest.json").exists()


def test_other_settings_are_refused_or_overwrite(tmp_path: Path) -> None:
    first, second = Work("dtd"), Work("pets")
    run(tmp_path, [first, second])
    with pytest.raises(UserError, match=r"transfer on dtd with other settings \(seeds was 5, now 3\)"):
        run(tmp_path, [first], seeds=3)
    run(tmp_path, [first], seeds=3, overwrite=True)
    assert (first.calls, second.calls) == (2, 1)
    assert len(all_stored(tmp_path)) == 2  # the other one is kept


def test_a_directory_belongs_to_one_backbone(tmp_path: Path) -> None:
    run(tmp_path, [Work("dtd")])
    other = {**BACKBONE, "identity": "sha256:bb"}
    with pytest.raises(UserError, match="backbone was"):
        run(tmp_path, [Work("pets")], backbone=other)
    run(tmp_path, [Work("pets")], backbone=other, overwrite=True)
    assert [r.dataset for r in all_stored(tmp_path)] == ["pets"]


def test_damaged_files_are_named(tmp_path: Path) -> None:
    run(tmp_path, [Work("dtd")])
    (tmp_path / "predictions/transfer-dtd.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match=r"transfer-dtd\.parquet is damaged"):
        predictions(tmp_path, "transfer-dtd")
    (tmp_path / "figures/transfer-dtd.json").write_text("{")
    with pytest.raises(UserError, match=r"transfer-dtd\.json is damaged; delete it"):
        run(tmp_path, [Work("dtd")])


def test_two_runs_into_one_directory(tmp_path: Path) -> None:
    inner = Work("pets")

    class Outer(Work):
        def __call__(self, report: Report) -> Result:
            with pytest.raises(UserError, match=r"in use|another"):
                run(tmp_path, [inner])
            return super().__call__(report)

    run(tmp_path, [Outer("dtd")])
    assert inner.calls == 0
