"""What a rebuild of the family checks before it trains for an hour and then replaces a directory."""

import dataclasses
from pathlib import Path

import pytest

from ubgen.core.errors import UserError
from ubgen.miniature.build import BuildConfig, build, check
from ubgen.miniature.train_generator import Budget


@pytest.fixture
def config(tmp_path: Path) -> BuildConfig:
    return BuildConfig(out=tmp_path / "weights", work=tmp_path / "work")


def test_a_directory_of_somebody_else_is_not_replaced(config: BuildConfig) -> None:
    config.out.mkdir()
    (config.out / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"--out: .* holds something else than a miniature family"):
        build(config)
    assert (config.out / "notes.txt").read_text() == "mine"
    assert not config.work.exists()


@pytest.mark.parametrize("out", ["work", "work/weights", "."])
def test_out_and_work_are_apart(config: BuildConfig, tmp_path: Path, out: str) -> None:
    with pytest.raises(UserError, match=r"--out: .* overlap"):
        build(dataclasses.replace(config, out=tmp_path / out))
    assert not config.work.exists()


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({"processes": 0}, "--processes must be at least 1, not 0"),
        ({"budget": Budget(clip_steps=-1)}, "--budget.clip-steps must be at least 1, not -1"),
    ],
)
def test_counts_are_checked_first(config: BuildConfig, changed: dict, line: str) -> None:
    with pytest.raises(UserError, match=line):
        build(dataclasses.replace(config, **changed))
    assert not config.work.exists()


def test_a_family_and_a_new_directory_may_be_written(config: BuildConfig) -> None:
    check(BuildConfig())  # the one that ships
    check(config)
