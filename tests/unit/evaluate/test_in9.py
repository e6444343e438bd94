"""IN-9: the released layout, the decision over all classes, pairs by foreground, and what is said of wrong data."""

import shutil

import numpy as np
import pytest

from ubgen.core.categories import load_mapping
from ubgen.core.errors import UserError, Warned
from ubgen.evaluate.in9 import backgrounds, foreground_of, open_backgrounds
from ubgen.measures import background_gap

MAPPING = load_mapping("in9-imagenet1k")
FIRST = {category.name: category.class_ids[0] for category in MAPPING.categories}
FOLDER = {category.name: category.folder for category in MAPPING.categories}
TABBY = "n02123045"  # in none of the nine

pytestmark = pytest.mark.filterwarnings("ignore::ubgen.core.errors.Warned")


def place(root, variant, category, number, background=7):
    wnid = FIRST[category]
    name = f"fg_{wnid}_{number:05}_bg_n01532829_{background:05}.JPEG"
    return root / variant / "val" / FOLDER[category] / name


@pytest.fixture
def root(tmp_path, paint):
    """Four foregrounds of each category, right on mixed_same; of dogs, two are taken for birds on mixed_rand."""
    for category in MAPPING.names:
        for number in range(4):
            paint(place(tmp_path, "mixed_same", category, number), FIRST[category])
            answer = FIRST["bird"] if category == "dog" and number < 2 else FIRST[category]
            paint(place(tmp_path, "mixed_rand", category, number, 100 - number), answer)
    return tmp_path


def test_gap_with_pairs(root, seer):
    result = backgrounds(seer(), open_backgrounds(root, MAPPING))
    assert result.main.value == pytest.approx(100 * 2 / 36)
    assert result.main.unit == "points"
    assert result.figures["mixed_same"].value == 100
    assert result.figures["mixed_rand"].value == pytest.approx(100 * 34 / 36)
    assert dict(result.counts) == {"mixed_same": 36, "mixed_rand": 36}
    assert result.details["paired by foreground"] is True
    expected = background_gap([1] * 36, [0] * 2 + [1] * 34)
    assert result.details["standard error"] == pytest.approx(expected.standard_error)
    rows = result.predictions
    at = rows["sample"].index(str(place(root, "mixed_rand", "dog", 0, 100).relative_to(root)))
    assert (rows["label"][at], rows["predicted"][at], rows["variant"][at]) == ("dog", "bird", "mixed_rand")
    assert rows["foreground"][at] == f"{FIRST['dog']}_00000"


def test_the_order_of_file_names_does_not_matter_for_pairs(root, seer, paint):
    """One foreground is wrong in both variants, and sorts to other places in them."""
    for path in (root / "mixed_same" / "val" / FOLDER["fish"]).iterdir():
        path.unlink()
    for number in range(4):
        paint(place(root, "mixed_same", "fish", number, 9 - number), FIRST["fish"])
    for variant, background in (("mixed_same", 7), ("mixed_rand", 98)):
        paint(place(root, variant, "fish", 2, background), TABBY)
    result = backgrounds(seer(), open_backgrounds(root, MAPPING))
    same, rand = np.ones(36, bool), np.ones(36, bool)
    same[-2] = rand[-2] = rand[0] = rand[1] = False
    assert result.details["standard error"] == pytest.approx(background_gap(same, rand).standard_error)


def test_a_class_in_none_of_the_nine_is_wrong(root, seer, paint):
    paint(place(root, "mixed_same", "carnivore", 0), TABBY)
    result = backgrounds(seer(), open_backgrounds(root, MAPPING))
    assert result.figures["mixed_same"].value == pytest.approx(100 * 35 / 36)
    at = result.predictions["sample"].index(str(place(root, "mixed_same", "carnivore", 0).relative_to(root)))
    assert (result.predictions["predicted"][at], result.predictions["class"][at]) == ("outside", TABBY)


def test_input_is_normalised_by_the_backbones_own_mean_and_deviation(root, seer):
    """The seer knows colours only after its own normalisation; another one's makes it wrong."""
    assert backgrounds(seer(), open_backgrounds(root, MAPPING)).figures["mixed_same"].value == 100
    other = seer(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    assert backgrounds(other, open_backgrounds(root, MAPPING)).figures["mixed_same"].value < 100


@pytest.mark.parametrize(
    ("name", "foreground"),
    [
        ("mixed_same/val/00_dog/fg_n02085620_16757_bg_n01532829_06835.JPEG", "n02085620_16757"),
        ("fg_disc_12_bg_square_3.png", "disc_12"),
        ("n02085620_16757.JPEG", "n02085620_16757"),
    ],
)
def test_foregrounds_by_name(name, foreground):
    assert foreground_of(name) == foreground


def test_foregrounds_that_do_not_pair_are_said_and_counted_apart(root, seer):
    place(root, "mixed_rand", "dog", 0, 100).rename(
        root / "mixed_rand" / "val" / FOLDER["dog"] / "another.JPEG"
    )
    with pytest.warns(Warned, match="only 35 foregrounds are in both of mixed_same"):
        data = open_backgrounds(root, MAPPING)
    result = backgrounds(seer(), data)
    assert result.main.value == pytest.approx(100 * 2 / 36)
    unpaired = background_gap([1] * 36, [0] * 2 + [1] * 34, paired=False)
    assert result.details["standard error"] == pytest.approx(unpaired.standard_error)
    assert result.details["paired by foreground"] is False


def test_the_same_seed_gives_the_same_interval(root, seer):
    data = open_backgrounds(root, MAPPING)
    first, again = (backgrounds(seer(), data, seed=s).main for s in (3, 3))
    assert first == again
    assert first.low <= first.value <= first.high


def test_another_number_of_images_than_released_is_said(root):
    with pytest.warns(Warned, match="mixed_rand holds 36 images; released are 4,050"):
        open_backgrounds(root, MAPPING)


def test_missing_directories_are_one_line(root):
    shutil.rmtree(root / "mixed_rand")
    with pytest.raises(
        UserError, match="lacks 9 of 18 directories, the first is mixed_rand/val/00_dog/"
    ) as caught:
        open_backgrounds(root, MAPPING)
    assert "\n" not in str(caught.value)
    (root / "mixed_same" / "val" / "08_fish").rename(root / "mixed_same" / "val" / "fish")
    with pytest.raises(UserError, match="lacks 10 of 18 directories, the first is mixed_same/val/08_fish/"):
        open_backgrounds(root, MAPPING)


def test_a_broken_image_is_named(root, seer):
    place(root, "mixed_same", "insect", 1).write_bytes(b"")
    with pytest.raises(
        UserError, match=r"05_insect/fg_n\d+_00001_bg_n01532829_00007\.JPEG: not a usable image"
    ):
        backgrounds(seer(), open_backgrounds(root, MAPPING))
