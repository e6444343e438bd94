"""Label mappings: the shipped ones against known ImageNet classes, and every way a file can be wrong."""

import json

import numpy as np
import pytest

from ubgen.core.categories import ATTRIBUTES, load_mapping, mapping_for, shipped_mappings
from ubgen.core.classes import load_classes
from ubgen.core.errors import UserError

IMAGENET = load_classes("imagenet1k").ids

# wnid -> category in cue conflict, FOCUS and IN-9; None where it is in none
KNOWN = {
    "n02690373": ("airplane", "plane", None),  # airliner
    "n02132136": ("bear", None, "carnivore"),  # brown bear
    "n02835271": ("bicycle", None, "vehicle"),  # tandem
    "n01530575": ("bird", "bird", "bird"),  # brambling
    "n02951358": ("boat", "ship", None),  # canoe
    "n02823428": ("bottle", None, None),  # beer bottle
    "n03100240": ("car", "car", "vehicle"),  # convertible
    "n02123045": ("cat", "cat", None),  # tabby
    "n02791124": ("chair", None, None),  # barber chair
    "n02708093": ("clock", None, None),  # analog clock
    "n02106662": ("dog", "dog", "dog"),  # German shepherd
    "n02504458": ("elephant", None, None),  # African elephant
    "n03085013": ("keyboard", None, None),  # computer keyboard
    "n03041632": ("knife", None, None),  # cleaver
    "n04111531": ("oven", None, None),  # rotisserie
    "n03345487": ("truck", "truck", "vehicle"),  # fire engine
    "n02389026": (None, "horse", None),  # sorrel
    "n02422106": (None, "deer", None),  # hartebeest
    "n01641577": (None, "frog", None),  # bullfrog
    "n01667114": (None, None, "reptile"),  # mud turtle
    "n02165456": (None, None, "insect"),  # ladybug
    "n02787622": (None, None, "instrument"),  # banjo
    "n02480495": (None, None, "primate"),  # orangutan
    "n01440764": (None, None, "fish"),  # tench
    "n15075141": (None, None, None),  # toilet paper
}


@pytest.mark.parametrize(("column", "benchmark"), enumerate(["cue-conflict", "focus", "in9"]))
def test_known_classes_are_in_their_category(column, benchmark):
    mapping = load_mapping(f"{benchmark}-imagenet1k")
    numbers = mapping.numbers(IMAGENET)
    assert numbers.shape == (1000,)
    for wnid, categories in KNOWN.items():
        number = numbers[IMAGENET.index(wnid)]
        assert (mapping.names[number] if number >= 0 else None) == categories[column], wnid


@pytest.mark.parametrize(("column", "benchmark"), enumerate(["cue-conflict", "focus", "in9"]))
def test_every_category_is_among_the_known_ones(column, benchmark):
    assert set(load_mapping(f"{benchmark}-imagenet1k").names) == {k[column] for k in KNOWN.values()} - {None}


def test_sizes_are_the_published_ones():
    """207 classes of 16, 226 of ten, and IN-9's nine sizes."""
    assert (load_mapping("cue-conflict-imagenet1k").numbers(IMAGENET) >= 0).sum() == 207
    assert (load_mapping("focus-imagenet1k").numbers(IMAGENET) >= 0).sum() == 226
    in9 = load_mapping("in9-imagenet1k").numbers(IMAGENET)
    assert np.bincount(in9 + 1).tolist() == [630, 116, 52, 42, 36, 35, 27, 26, 20, 16]


def test_numbers_follow_the_ids_and_not_the_positions():
    mapping = load_mapping("in9-imagenet1k")
    order = np.random.default_rng(0).permutation(1000)
    shuffled = [IMAGENET[i] for i in order]
    assert (mapping.numbers(shuffled) == mapping.numbers(IMAGENET)[order]).all()


def test_folders_and_uncommon_values():
    assert [c.folder for c in load_mapping("in9-imagenet1k").categories][2:4] == [
        "02_wheeled vehicle",
        "03_reptile",
    ]
    assert load_mapping("cue-conflict-imagenet1k").categories[0].folder == "airplane"
    focus = {c.name: c for c in load_mapping("focus-imagenet1k").categories}
    assert focus["frog"].uncommon["time"] == frozenset()
    assert all("night" in c.uncommon["time"] for name, c in focus.items() if name != "frog")
    assert focus["dog"].uncommon["locations"] == {"forest", "rocks", "snow"}


@pytest.mark.parametrize("name", shipped_mappings())
def test_every_shipped_mapping_fits_its_class_list(name):
    mapping = load_mapping(name)
    assert name == mapping.name
    assert mapping.missing(load_classes(mapping.class_list).ids) == []
    assert mapping.source
    assert mapping.licence or mapping.class_list == "miniature"
    assert bool(mapping.attributes) == (mapping.benchmark == "focus")


def test_the_mapping_is_found_by_the_backbones_classes():
    assert mapping_for("focus", IMAGENET).class_list == "imagenet1k"
    with pytest.raises(
        UserError, match=r"lacks \d+ of the 207 imagenet1k classes that cue-conflict needs, such as 'n"
    ):
        mapping_for("cue-conflict", load_classes("imagenet100").ids)
    with pytest.raises(UserError, match=r"in9 needs the classes of imagenet1k.* has 2 others, such as 'a'"):
        mapping_for("in9", ["a", "b"])


def mapping(**changes):
    truck = {"class_ids": ["a"], "uncommon": {"time": ["night"], "weather": [], "locations": []}}
    attributes = {"time": ["day", "night"], "weather": ["sunny"], "locations": ["grass"]}
    return {
        "benchmark": "focus",
        "class_list": "mine",
        "source": "here",
        "licence": "none",
        "attributes": attributes,
        "categories": {"truck": truck},
        **changes,
    }


def test_a_users_own_file(tmp_path):
    (tmp_path / "mine.json").write_text(json.dumps(mapping()))
    loaded = load_mapping(tmp_path / "mine.json")
    assert loaded.numbers(["b", "a"]).tolist() == [-1, 0]
    assert set(loaded.categories[0].uncommon) == set(ATTRIBUTES)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not valid JSON"),
        ("[1]", "is not a label mapping"),
        (json.dumps({"categories": {}}), "needs the key 'benchmark'"),
        (json.dumps(mapping(categories={"x": {}})), "needs the key 'class_ids'"),
        (json.dumps(mapping(categories={"x": {"class_ids": [1]}})), "category 'x' needs class ids"),
        (json.dumps(mapping(categories={"x": {"class_ids": []}})), "category 'x' needs class ids"),
        (json.dumps(mapping(categories={"x": {"class_ids": ["a"]}})), "needs the key 'uncommon'"),
        (json.dumps(mapping(images="20")), "images must be a positive number, not '20'"),
        (json.dumps(mapping(attributes={"time": []})), "attributes must be time, weather, locations"),
        (
            json.dumps(mapping(attributes={"time": ["day"], "weather": [], "locations": []})),
            "'night' is not one of the values of 'time'",
        ),
        (
            json.dumps(
                mapping(attributes={}, categories={"x": {"class_ids": ["a"]}, "y": {"class_ids": ["b", "a"]}})
            ),
            "class 'a' is in 'x' and in 'y'",
        ),
    ],
)
def test_a_wrong_file_is_refused_in_one_line(tmp_path, content, message):
    path = tmp_path / "mine.json"
    path.write_text(content)
    with pytest.raises(UserError) as caught:
        load_mapping(path)
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_an_unknown_name_lists_the_shipped_ones():
    with pytest.raises(UserError, match="neither a file nor one of cue-conflict-imagenet1k"):
        load_mapping("nothing")
