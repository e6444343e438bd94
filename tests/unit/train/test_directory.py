from pathlib import Path

import pytest

from ubgen.classes import ClassList
from ubgen.errors import UserError
from ubgen.train.directory import clear_directory, first_difference, prepare_directory

CLASSES = ClassList(("n01", "n02"), ("cat", "dog"))
CONFIG = {"seed": 1, "generator": {"lr": 1e-4, "betas": (0.9, 0.999)}}


def test_first_difference_names_the_option_and_both_values() -> None:
    assert first_difference(CONFIG, CONFIG) is None
    changed = {"seed": 1, "generator": {"lr": 2e-4, "betas": (0.9, 0.999)}}
    assert first_difference(CONFIG, changed) == "generator.lr was 0.0001, now 0.0002"
    assert first_difference(CONFIG, {**CONFIG, "epochs": 3}) == "epochs was None, now 3"


def test_the_same_configuration_continues_and_another_is_refused(tmp_path: Path) -> None:
    prepare_directory(tmp_path, CONFIG, CLASSES, overwrite=False)
    assert (tmp_path / "classes.txt").read_text() == "n01\tcat\nn02\tdog\n"
    prepare_directory(tmp_path, CONFIG, CLASSES, overwrite=False)
    with pytest.raises(UserError, match=r"seed was 1, now 2.*--overwrite"):
        prepare_directory(tmp_path, {**CONFIG, "seed": 2}, CLASSES, overwrite=False)
    with pytest.raises(UserError, match="class list"):
        prepare_directory(tmp_path, CONFIG, ClassList(("n01",), ("cat",)), overwrite=False)


def test_overwriting_removes_the_earlier_run_and_nothing_else(tmp_path: Path) -> None:
    prepare_directory(tmp_path, CONFIG, CLASSES, overwrite=False)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "checkpoints" / "000010").mkdir(parents=True)
    prepare_directory(tmp_path, {**CONFIG, "seed": 2}, CLASSES, overwrite=True)
    assert not (tmp_path / "checkpoints").exists()
    clear_directory(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
