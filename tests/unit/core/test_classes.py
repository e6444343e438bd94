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


def assert_refused(path, message):
    """In one line that begins with the file."""
    with pytest.raises(UserError) as caught:
        load_classes(path)
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


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
    assert_refused(write(tmp_path, content), message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "class_id,class_name\n0,tench\n1,goldfish\n",
            "line 1: 'class_id,class_name' is the header of a table",
        ),
        ("id\tname\nn01440764\ttench\n", "line 1: 'id\\tname' is the header of a table"),
        ("0,tench\n1,goldfish\n", "is a comma-separated table"),
        ("0;tench\n1;goldfish\n", "is a semicolon-separated table"),
        ("# my classes\ntench\n", "line 1: '# my classes' looks like a comment"),
        ("tench\n\n# fish end here\n", "line 3: '# fish end here' looks like a comment"),
        ('"golden retriever"\n"tench"\n', "line 1: '\"golden retriever\"' is in quotes"),
        ("'tench',\n'goldfish',\n", "is in quotes"),
        ("- tench\n- goldfish\n", "line 1: '- tench' looks like YAML"),
        ("names:\n  0: tench\n", "line 1: 'names:' looks like a key of YAML"),
        ("0: tench\n1: goldfish\n", "its lines are numbered"),
        ("1. tench\n2. goldfish\n", "its lines are numbered"),
        ("0 tench\n1 goldfish\n", "its lines are numbered"),
        ('["tench", "goldfish"\n', "looks like JSON, but is not valid"),
        ('{"tench": 1, "goldfish": 5}', "this JSON is not a class list"),
        ('{"0": "tench", "2": "goldfish"}', "this JSON is not a class list"),
        ('{"names": ["tench"]}', "this JSON is not a class list"),
        ('["tench", 7]', "this JSON is not a class list"),
        ("[]", "this JSON is not a class list"),
        ('["tench", "tench"]', "line 2: 'tench' is already on line 1"),
    ],
)
def test_another_format_is_refused_in_one_line_that_says_what_to_write(tmp_path, content, message):
    assert_refused(write(tmp_path, content), message)


IMAGENET = ((("n01440764", "n01443537", "n01484850")), ("tench", "goldfish", "great white shark"))


@pytest.mark.parametrize(
    ("content", "ids", "names"),
    [
        ("n01440764 tench\nn01443537 goldfish\nn01484850 great white shark\n", *IMAGENET),
        (
            "n01440764 tench, Tinca tinca\nn01443537 goldfish, Carassius auratus\n",
            ("n01440764", "n01443537"),
            ("tench, Tinca tinca", "goldfish, Carassius auratus"),
        ),
        (
            '{"0": ["n01440764", "tench"], "2": ["n01484850", "great_white_shark"], "1": ["n01443537", "goldfish"]}',
            *IMAGENET,
        ),
        ('{"n01440764": "tench",\n "n01443537": "goldfish",\n "n01484850": "great white shark"}', *IMAGENET),
        ('["tench",\n "Rock Étoile"]', ("tench", "rock-étoile"), ("tench", "Rock Étoile")),
        (
            '{"10": "k", "0": "a", "1": "b", "2": "c", "3": "d", "4": "e", "5": "f", "6": "g", "7": "h", "8": "i",'
            ' "9": "j"}',
            tuple("abcdefghijk"),
            tuple("abcdefghijk"),
        ),
        ('{"goldfish": 1, "tench": 0}', ("tench", "goldfish"), ("tench", "goldfish")),
    ],
    ids=["wnid", "synset words", "class index", "id to name", "names", "label to name", "name to label"],
)
def test_the_usual_files_of_imagenet_and_json_are_read_in_label_order(tmp_path, content, ids, names):
    classes = load_classes(write(tmp_path, content))
    assert (classes.ids, classes.names) == (ids, names)


@pytest.mark.parametrize(
    "names",
    [
        ("7 UP bottle", "9 volt battery"),
        ("tench, adult", "goldfish, adult"),
        ("label", "tag"),
        ("C#", "Java"),
    ],
)
def test_names_that_only_look_a_little_like_another_format_stay(tmp_path, names):
    assert load_classes(write(tmp_path, "\n".join(names))).names == names


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
