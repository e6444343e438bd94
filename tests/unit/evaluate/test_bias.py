"""The three benchmarks by name: what is missing is said at once, for all of them."""

import sqlite3
from contextlib import closing
from dataclasses import replace

import pytest

from ubgen.core.categories import load_mapping
from ubgen.core.errors import UserError
from ubgen.evaluate.bias import BENCHMARKS, open_benchmarks, require_benchmarks
from ubgen.evaluate.classify import known_classes
from ubgen.evaluate.focus import open_focus

pytestmark = pytest.mark.filterwarnings("ignore::ubgen.core.errors.Warned")


def test_everything_that_is_missing_is_said_at_once(tmp_path):
    with pytest.raises(UserError) as caught:
        require_benchmarks(list(BENCHMARKS), tmp_path)
    first, *lines = str(caught.value).splitlines()
    assert first == "3 benchmarks of bias cannot be used:"
    for name, line in zip(BENCHMARKS, lines, strict=True):
        assert line.startswith(f"  {name}: {tmp_path / name} is missing; expected {name}/")
        assert "get it from https://github.com/" in line


def test_one_line_for_one(tmp_path):
    with pytest.raises(UserError) as caught:
        require_benchmarks(["focus"], tmp_path)
    assert "\n" not in str(caught.value)
    with pytest.raises(
        UserError, match="'stylised' is no benchmark of bias; choose from cue-conflict, focus, in9"
    ):
        require_benchmarks(["stylised"], tmp_path)


def test_what_is_damaged_is_said_with_the_layout(tmp_path, seer):
    for name in ("focus", "in9"):
        (tmp_path / name).mkdir()
    with pytest.raises(UserError) as caught:
        open_benchmarks(["focus", "in9"], tmp_path, seer())
    lines = str(caught.value).splitlines()
    assert "annotations.db is missing; expected focus/annotations.db" in lines[1]
    assert "lacks 18 of 18 directories" in lines[2]


def test_a_backbone_of_other_classes_is_refused(tmp_path, seer):
    (tmp_path / "in9").mkdir()
    with pytest.raises(UserError, match="in9: backbone seer: in9 needs the classes of imagenet1k"):
        open_benchmarks(["in9"], tmp_path, seer(["a", "b"]))
    assert known_classes(seer(["a", "b"])) == ("a", "b")


def test_fingerprints_tell_other_annotations_apart(tmp_path, paint):
    """The same images in the same categories, with another number of uncommon attributes."""
    mapping = load_mapping("focus-imagenet1k")
    found = []
    for time in ("day", "night", "day"):
        paint(tmp_path / "cat" / "1.jpg", mapping.categories[4].class_ids[0])
        (tmp_path / "annotations.db").unlink(missing_ok=True)
        with closing(sqlite3.connect(tmp_path / "annotations.db")) as database:
            columns = "file_name, category, time, weather, locations, humans"
            database.execute(f"CREATE TABLE annotations ({columns})")
            database.execute(
                "INSERT INTO annotations VALUES ('/cat/1.jpg', 'cat', ?, 'sunny', 'grass', 'no')", (time,)
            )
            database.commit()
        found.append(open_focus(tmp_path, mapping).fingerprint())
    assert found[0] == found[2] != found[1]
    other = replace(mapping, categories=mapping.categories[:5])
    assert open_focus(tmp_path, other).fingerprint() not in found
