"""The three benchmarks by name: what is missing is said at once, for all of them."""

import pytest

from ubgen.core.errors import UserError
from ubgen.evaluate.bias import BENCHMARKS, open_benchmarks, require_benchmarks
from ubgen.evaluate.classify import known_classes


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
    with pytest.raises(UserError, match="in9: seer: in9 needs a backbone with the classes of imagenet1k"):
        open_benchmarks(["in9"], tmp_path, seer(["a", "b"]))
    assert known_classes(seer(["a", "b"])) == ("a", "b")
