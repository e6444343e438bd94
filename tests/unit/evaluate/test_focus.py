"""FOCUS: the released layout, partitions by uncommon attributes, and what is said of wrong data."""

import io
import sqlite3
from contextlib import closing

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torchvision import transforms

from ubgen.core.categories import load_mapping
from ubgen.core.classes import load_classes
from ubgen.core.errors import UserError, Warned
from ubgen.evaluate.backbone import load_backbone
from ubgen.evaluate.focus import focus, open_focus
from ubgen.measures import context_score

MAPPING = load_mapping("focus-imagenet1k")
IDS = {category.name: category.class_ids for category in MAPPING.categories}
WRONG = "n15075141"  # toilet paper, in no category

pytestmark = pytest.mark.filterwarnings("ignore::ubgen.core.errors.Warned")


def write_database(root, rows):
    """As the released one: a table with a text key, six columns of text."""
    (root / "annotations.db").unlink(missing_ok=True)
    with closing(sqlite3.connect(root / "annotations.db")) as database:
        columns = (
            "file_name TEXT PRIMARY KEY, category TEXT, time TEXT, weather TEXT, locations TEXT, humans TEXT"
        )
        database.execute(f"CREATE TABLE annotations ({columns})")
        database.executemany("INSERT INTO annotations VALUES (?, ?, ?, ?, ?, ?)", rows)
        database.commit()


# name, category, time, weather, locations, humans; k; painted as
ROWS = [
    (("/truck/1.jpg", "truck", "day", "sunny", "street", "no"), 0, IDS["truck"][0]),
    (("/truck/2.jpg", "truck", "day", "cloudy", "grass, street", "yes"), 0, IDS["truck"][9]),
    (("/frog/3.jpg", "frog", "night", "none", "grass", "no"), 0, IDS["frog"][1]),  # night is common for frogs
    (("/frog/4.jpg", "frog", "day", "none", "none", "no"), 0, WRONG),
    (("/cat/5.jpg", "cat", "night", "none", "indoors", "yes"), 1, IDS["cat"][2]),
    (("/dog/6.jpg", "dog", "day", "sunny", "grass, snow", "yes"), 1, IDS["cat"][2]),
    (("/ship/7.jpg", "ship", "day", "sunny", "sand,street,water", "yes"), 1, IDS["ship"][1]),  # one attribute
    (("/plane/8.jpg", "plane", "none", "foggy", "forest", "no"), 2, IDS["plane"][0]),
    (("/bird/9.jpg", "bird", "night", "raining", "water", "no"), 2, WRONG),
    (("/horse/10.jpg", "horse", "night", "snowing", "snow", "no"), 3, IDS["horse"][0]),
    (("/deer/11.jpg", "deer", "night", "snowing", "water", "no"), 3, IDS["horse"][0]),
]


@pytest.fixture
def root(tmp_path_factory, paint):
    root = tmp_path_factory.mktemp("focus")
    for row, _, wnid in ROWS:
        paint(root / row[0][1:], wnid, (90, 60))
    write_database(root, [row for row, _, _ in ROWS])
    return root


def test_partitions_and_score(root, seer):
    data = open_focus(root, MAPPING)
    expected = {row[0][1:]: k for row, k, _ in ROWS}
    keys = [data.images.keys[i] for i in range(len(data.images))]
    assert dict(zip(keys, data.uncommon.tolist(), strict=True)) == expected
    result = focus(seer(), data)
    figures = {name: figure.value for name, figure in result.figures.items()}
    assert dict(result.counts) == {"P0": 4, "P1": 3, "P2": 2, "P3": 2}
    assert figures["P0 accuracy"] == 75
    assert figures["P1 accuracy"] == pytest.approx(200 / 3)
    assert figures["P2 accuracy"] == 50
    assert figures["P3 accuracy"] == 50
    assert figures["CB_avg"] == pytest.approx(100 * (8 / 9 + 2 / 3 + 2 / 3) / 3)
    assert figures["CB_12"] == pytest.approx(100 * (8 / 9 + 2 / 3) / 2)
    assert next(iter(figures)) == "CB_avg"
    rows = result.predictions
    assert context_score(rows["correct"], rows["uncommon"]).cb_avg == pytest.approx(figures["CB_avg"])
    at = keys.index("bird/9.jpg")
    assert (rows["label"][at], rows["predicted"][at], rows["class"][at]) == ("bird", "outside", WRONG)


def test_an_empty_partition_is_undefined(root, seer):
    write_database(root, [row for row, k, _ in ROWS if k != 3])
    result = focus(seer(), open_focus(root, MAPPING))
    assert result.main.value is None
    assert result.figures["CB_12"].value is not None
    assert result.figures["P3 accuracy"].value is None
    assert result.counts["P3"] == 0


def test_a_real_network_agrees_with_the_published_transform(root, tmp_path):
    """Shorter side to 224 (bilinear), centre crop, mean and deviation; argmax over all 1,000; Pillow decodes."""
    rng = np.random.default_rng(0)
    for row, _, _ in ROWS:
        blocks = np.kron(rng.integers(0, 256, (10, 15, 3)), np.ones((30, 30, 1))) * rng.random(3)
        Image.fromarray(blocks.astype(np.uint8)).save(root / row[0][1:], quality=95)
    torch.manual_seed(1)
    save_file(timm.create_model("test_resnet").state_dict(), tmp_path / "weights.safetensors")
    backbone = load_backbone(
        f"timm:test_resnet@{tmp_path / 'weights.safetensors'}", device="cpu", image_size=224
    )
    published = transforms.Compose(
        [
            transforms.Resize(224),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
            transforms.Normalize(backbone.mean, backbone.std),
        ]
    )
    seen = []
    backbone.network.conv1.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    result = focus(backbone, open_focus(root, MAPPING))
    images = torch.stack([published(Image.open(root / key)) for key in result.predictions["sample"]])
    assert (torch.cat(seen) - images).abs().max() < 1e-5
    with torch.no_grad():
        expected = [load_classes("imagenet1k").ids[i] for i in backbone.network(images).argmax(1)]
    assert result.predictions["class"].tolist() == expected


def test_a_jpeg_that_ends_early_counts(root, seer, paint):
    """The released code reads such files, too; what is missing is at the bottom."""
    path = paint(root / "horse" / "10.jpg", IDS["horse"][0], (90, 60))
    whole = path.read_bytes()
    path.write_bytes(whole[:-2])
    assert focus(seer(), open_focus(root, MAPPING)).figures["P3 accuracy"].value == 50
    path.write_bytes(b"\xff\xd8 nothing")
    with pytest.raises(UserError, match=r"horse/10\.jpg: not a usable image"):
        focus(seer(), open_focus(root, MAPPING))


def test_another_number_of_images_than_released_is_said(root):
    with pytest.warns(Warned, match="holds 11 images; released are 20,815"):
        open_focus(root, MAPPING)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (("/x.jpg", "spoon", "day", "sunny", "grass", "no"), "category 'spoon' is none of truck, car"),
        (("/x.jpg", "cat", "noon", "sunny", "grass", "no"), "time 'noon' is none of day, night, none"),
        (("/x.jpg", "cat", "day", "", "grass", "no"), "weather '' is none of cloudy"),
        (("/x.jpg", "cat", "day", "sunny", "grass, moon", "no"), "locations 'moon' is none of forest"),
        (("/x.jpg", "cat", None, "sunny", "grass", "no"), "has a value that is not text"),
        (("/../x.jpg", "cat", "day", "sunny", "grass", "no"), "no path of a file below"),
        (("//etc/x.jpg", "cat", "day", "sunny", "grass", "no"), "no path of a file below"),
        (("/", "cat", "day", "sunny", "grass", "no"), "no path of a file below"),
    ],
)
def test_wrong_values_name_the_image(root, row, message):
    write_database(root, [row])
    with pytest.raises(UserError, match=message) as caught:
        open_focus(root, MAPPING)
    assert str(caught.value).startswith(f"{root / 'annotations.db'}: image {row[0]!r}")
    assert "\n" not in str(caught.value)


def test_missing_images_are_counted(root):
    (root / "cat" / "5.jpg").unlink()
    (root / "deer" / "11.jpg").unlink()
    with pytest.raises(
        UserError, match=r"2 of 11 images are missing, the first is .*5\.jpg; names in annotations.db"
    ):
        open_focus(root, MAPPING)


def damaged(content):
    """The second page of the database is overwritten: the header is whole."""
    return content[:4096] + b"\x07" * (len(content) - 4096)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda content: b"not a database at all, but long enough to be looked at" * 99,
            "not a whole SQLite database",
        ),
        (damaged, "not a whole SQLite database|malformed"),
        (lambda content: content[: len(content) // 2], "not a whole SQLite database|malformed"),
        (
            lambda content: b"",
            "no such table: annotations; expected a table annotations with file_name, category",
        ),
    ],
)
def test_a_damaged_database_is_one_line(root, change, message):
    path = root / "annotations.db"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(UserError, match=message) as caught:
        open_focus(root, MAPPING)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_another_table_and_no_database(root):
    path = root / "annotations.db"
    path.unlink()
    with pytest.raises(UserError, match=r"annotations\.db is missing"):
        open_focus(root, MAPPING)
    with closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE annotations (file_name TEXT, category TEXT)")
    with pytest.raises(UserError, match="no such column: time; expected a table annotations with"):
        open_focus(root, MAPPING)
    write_database(root, [])
    with pytest.raises(UserError, match="holds no image"):
        open_focus(root, MAPPING)


def test_the_database_is_not_written_to(root):
    path = root / "annotations.db"
    path.chmod(0o400)
    before = path.read_bytes(), path.stat().st_mtime_ns
    open_focus(root, MAPPING)
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before
    assert sorted(p.name for p in root.glob("annotations*")) == ["annotations.db"]


def test_a_decoded_prefix_is_what_pillow_gives(tmp_path):
    """Of a JPEG without its last third."""
    from PIL import ImageFile

    from ubgen.loading.decode import decode

    rng = np.random.default_rng(0)
    blocks = np.kron(rng.integers(0, 256, (20, 20, 3)), np.ones((8, 8, 1))).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(blocks).save(buffer, "JPEG", quality=95)
    part = buffer.getvalue()[: len(buffer.getvalue()) * 2 // 3]
    ImageFile.LOAD_TRUNCATED_IMAGES = True
    try:
        theirs = np.asarray(Image.open(io.BytesIO(part)).convert("RGB"), np.int16)
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = False
    ours = decode(part, strict=False).astype(np.int16)
    rows = slice(0, 64)
    assert np.abs(ours[rows] - theirs[rows]).max() <= 2
    with pytest.raises(ValueError, match="Premature end"):
        decode(part)
