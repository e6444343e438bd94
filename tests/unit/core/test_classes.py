"""Class lists: the shipped ones, users' files, and every way a file can be wrong."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ubgen.core.classes import load_classes, safe_file_name, shipped_lists
from ubgen.core.errors import UserError


def write(tmp_path, content):
    path = tmp_path / "classes.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_imagenet1k_has_its_thousand_classes_in_label_order():
    classes = load_classes("imagenet1k")
    assert len(classes) == 1000
    assert (classes.ids[0], classes.names[0]) == ("n01440764", "tench")
    assert (classes.ids[999], classes.names[999]) == ("n15075141", "toilet paper")
    assert list(classes.ids) == sorted(classes.ids)


def test_two_pairs_of_imagenet1k_share_a_name():
    names = load_classes("imagenet1k").names
    assert sorted(n for n in set(names) if names.count(n) > 1) == ["missile", "sunglasses"]


def test_imagenet100_is_a_part_of_imagenet1k_with_the_same_names():
    small, large = load_classes("imagenet100"), load_classes("imagenet1k")
    names = dict(zip(large.ids, large.names, strict=True))
    assert len(small) == 100
    assert [names[i] for i in small.ids] == list(small.names)


def test_first_lemmas_carry_the_same_ids():
    lemmas = load_classes("imagenet1k-first-lemma")
    assert lemmas.ids == load_classes("imagenet1k").ids
    assert lemmas.names[4] == "hammerhead"


@pytest.mark.parametrize("name", shipped_lists())
def test_every_shipped_list_has_safe_ids(name):
    classes = load_classes(name)
    assert all(class_id == safe_file_name(class_id) for class_id in classes.ids)


def test_lines_with_and_without_ids(tmp_path):
    path = write(tmp_path, "cat\ncable\tAC/DC adaptor\r\n\nRock Étoile (large)\n")
    classes = load_classes(path)
    assert classes.ids == ("cat", "cable", "rock-étoile-large")
    assert classes.names == ("cat", "AC/DC adaptor", "Rock Étoile (large)")


def test_a_byte_order_mark_and_a_missing_last_newline_are_fine(tmp_path):
    assert load_classes(write(tmp_path, b"\xef\xbb\xbfcat\ndog")).names == ("cat", "dog")


def test_a_name_may_repeat_under_distinct_ids(tmp_path):
    assert load_classes(write(tmp_path, "crane-1\tcrane\ncrane-2\tcrane\n")).names == ("crane", "crane")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no classes"),
        ("\n \n", "holds no classes"),
        ("cat\ndog\ncat\n", "line 3: 'cat' is already on line 1"),
        ("a\tcat\na\tdog\n", "line 2: the id 'a' is already used on line 1"),
        ("Great Owl\ngreat  owl\n", "line 2: the id 'great-owl' is already used on line 1"),
        (b"cat\nd\xe9j\xe0\n", "line 2: byte 2 is not UTF-8"),
        ("cat\ndo\x00g\n", "line 2: control character '\\x00'"),
        ("../../etc/passwd\n", "line 1: the class name '../../etc/passwd' has path characters"),
        ("cat/dog\n", "has path characters"),
        ("cat\\dog\n", "has path characters"),
        ("../x\tcat\n", "line 1: the id '../x' cannot be a file name"),
        ("a\tb\tc\n", "more than one tab"),
        ("a\t\n", "an empty id or name"),
        ("\tcat\n", "an empty id or name"),
    ],
)
def test_a_wrong_file_is_refused_with_its_place(tmp_path, content, message):
    path = write(tmp_path, content)
    with pytest.raises(UserError) as caught:
        load_classes(path)
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(UserError, match=r"'imagenet' is neither a file nor one of .*imagenet1k"):
        load_classes("imagenet")


def test_a_directory_is_no_class_list(tmp_path):
    with pytest.raises(UserError, match="is a directory"):
        load_classes(tmp_path)


@given(st.text())
def test_safe_file_names_are_always_one_component(text):
    name = safe_file_name(text)
    assert 1 <= len(name.encode()) <= 100
    assert name not in (".", "..")
    assert not set(name) & set("/\\:\0\n")
    assert safe_file_name(name) == name
