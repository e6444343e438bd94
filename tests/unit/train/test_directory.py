import json
from pathlib import Path

import pytest

from ubgen.core.classes import ClassList
from ubgen.core.errors import UserError
from ubgen.train.directory import check_directory, first_difference, prepare_directory

CLASSES = ClassList(("n01", "n02"), ("cat", "dog"))
RECORD = {"networks": {"clip": "clip"}, "classes": "classes.txt", "processes": 1}
CONFIG = {**RECORD, "seed": 1, "generator": {"lr": 1e-4, "betas": (0.9, 0.999)}}
OTHER = {**CONFIG, "seed": 2}


def begin(out: Path, config: dict = CONFIG, classes: ClassList = CLASSES, overwrite: bool = False) -> None:
    check_directory(out, config, classes, overwrite)
    prepare_directory(out, config, classes, overwrite)


def add_checkpoint(out: Path) -> None:
    (out / "checkpoints" / "000010").mkdir(parents=True)
    (out / "checkpoints" / "000010" / "state.pt").touch()


def seed_of(out: Path) -> int:
    return json.loads((out / "config.json").read_text())["seed"]


def test_first_difference_names_the_option_and_both_values() -> None:
    assert first_difference(CONFIG, CONFIG) is None
    changed = {**CONFIG, "generator": {"lr": 2e-4, "betas": (0.9, 0.999)}}
    assert first_difference(CONFIG, changed) == "generator.lr was 0.0001, now 0.0002"
    assert first_difference(CONFIG, {**CONFIG, "epochs": 3}) == "epochs was None, now 3"


def test_the_same_configuration_continues_and_another_is_refused(tmp_path: Path) -> None:
    begin(tmp_path)
    assert (tmp_path / "classes.txt").read_text() == "n01\tcat\nn02\tdog\n"
    add_checkpoint(tmp_path)
    begin(tmp_path)
    assert (tmp_path / "checkpoints" / "000010").is_dir()
    with pytest.raises(UserError, match=r"seed was 1, now 2.*--overwrite"):
        begin(tmp_path, OTHER)
    with pytest.raises(UserError, match="class list"):
        begin(tmp_path, classes=ClassList(("n01",), ("cat",)))
    assert seed_of(tmp_path) == 1


def test_an_attempt_without_a_checkpoint_gives_way_to_a_corrected_one(tmp_path: Path) -> None:
    begin(tmp_path)
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "000000.png").write_text("of the first attempt")
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    begin(tmp_path, OTHER)
    assert seed_of(tmp_path) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["classes.txt", "config.json"]


def test_overwriting_removes_the_earlier_run_and_nothing_else(tmp_path: Path) -> None:
    begin(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    add_checkpoint(tmp_path)
    begin(tmp_path, OTHER, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["classes.txt", "config.json", "notes.txt"]
    assert seed_of(tmp_path) == 2


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("classes.txt", "my own classes"),
        ("config.json", '{"architectures": ["MPLUGOwl2"], "classes": 2}'),
        ("config.json", "[1]"),
        ("manifest.json", "{}"),
        ("samples/holiday.jpg", ""),
    ],
)
def test_files_of_somebody_else_are_not_replaced(
    tmp_path: Path, name: str, content: str, overwrite: bool
) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(content)
    with pytest.raises(
        UserError, match=rf"--out: .* holds something else than a run \({name.split('/')[0]}\)"
    ):
        check_directory(tmp_path, CONFIG, CLASSES, overwrite)


def test_a_log_of_the_command_may_lie_there(tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_text("")
    begin(tmp_path)
    assert seed_of(tmp_path) == 1


def test_clearing_that_was_cut_short_begins_again(tmp_path: Path) -> None:
    """What is left belongs to a run as long as anything of it is left."""
    begin(tmp_path)
    (tmp_path / "classes.txt").unlink()
    begin(tmp_path)
    assert (tmp_path / "classes.txt").read_text() == "n01\tcat\nn02\tdog\n"
