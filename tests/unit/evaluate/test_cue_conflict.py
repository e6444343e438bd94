"""Cue conflict: the released layout, the decision rule, and what is said of wrong data."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torchvision.transforms.functional import normalize, pil_to_tensor

from ubgen.core.categories import load_mapping
from ubgen.core.classes import load_classes
from ubgen.core.errors import UserError, Warned
from ubgen.evaluate.backbone import load_backbone
from ubgen.evaluate.classify import mapping_of
from ubgen.evaluate.cue_conflict import category_probabilities, cue_conflict, open_cue_conflict

MAPPING = load_mapping("cue-conflict-imagenet1k")
IMAGENET = load_classes("imagenet1k").ids
FIRST = {category.name: category.class_ids[0] for category in MAPPING.categories}

pytestmark = pytest.mark.filterwarnings("ignore::ubgen.core.errors.Warned")


@pytest.fixture
def root(tmp_path_factory, paint):
    """Each shape with the textures of the next one, the one after it, and its own; painted as shape, texture, shape."""
    tmp_path, names = tmp_path_factory.mktemp("cue-conflict"), MAPPING.names
    for i, shape in enumerate(names):
        second, third = names[(i + 1) % 16], names[(i + 2) % 16]
        paint(tmp_path / shape / f"{shape}1-{second}2.png", FIRST[shape])
        paint(tmp_path / shape / f"{shape}12-{third}10.png", FIRST[third])
        paint(tmp_path / shape / f"{shape}3-{shape}4.png", FIRST[shape])
    return tmp_path


def test_counts_and_inclination(root, seer):
    backbone = seer()
    result = cue_conflict(backbone, open_cue_conflict(root, mapping_of("cue-conflict", backbone)))
    assert result.main.value == 50.0
    assert result.main.low < 50 < result.main.high
    assert dict(result.counts) == {
        "images": 32,
        "left out, shape is texture": 16,
        "by shape": 16,
        "by texture": 16,
        "by neither": 0,
    }
    rows = {name: np.asarray(column) for name, column in result.predictions.items()}
    assert len(rows["sample"]) == 32
    at = rows["sample"].tolist().index("cat/cat1-chair2.png")
    assert (rows["label"][at], rows["texture"][at], rows["predicted"][at]) == ("cat", "chair", "cat")
    assert (rows["correct"] == (rows["predicted"] == rows["label"])).all()


def test_an_answer_outside_shape_and_texture_counts_for_neither(root, seer, paint):
    paint(root / "cat" / "cat1-chair2.png", FIRST["oven"])
    result = cue_conflict(seer(), open_cue_conflict(root, MAPPING))
    assert result.main.value == pytest.approx(100 * 16 / 31)
    assert result.counts["by neither"] == 1


def test_without_a_decision_for_shape_or_texture_it_is_undefined(root, seer, paint):
    for path in root.glob("*/*.png"):
        paint(path, FIRST["oven"])
    shutil.rmtree(root / "oven")
    paint(root / "oven" / "oven1-oven2.png", FIRST["oven"])
    for path in root.glob("*/*-oven*.png"):
        if path.parent.name != "oven":
            path.unlink()
    result = cue_conflict(seer(), open_cue_conflict(root, MAPPING))
    assert result.main.value is None
    assert result.main.text() == "undefined"


def test_the_mean_decides_and_not_the_sum():
    """All 109 dogs at a logit just below that of the one airliner: their sum is larger, their mean is not."""
    logits = np.zeros((1, 1000), np.float32)
    dogs = [IMAGENET.index(i) for c in MAPPING.categories if c.name == "dog" for i in c.class_ids]
    logits[0, dogs] = 5
    logits[0, IMAGENET.index(FIRST["airplane"])] = 5.1
    probabilities = category_probabilities(logits, MAPPING, IMAGENET)
    assert MAPPING.names[probabilities.argmax()] == "airplane"
    softmax = np.exp(logits[0].astype(float)) / np.exp(logits[0].astype(float)).sum()
    assert probabilities[0, MAPPING.names.index("dog")] == pytest.approx(softmax[dogs].mean())
    assert probabilities[0, MAPPING.names.index("dog")] * 109 > probabilities.max()


def test_large_logits_do_not_overflow():
    logits = np.full((2, 1000), 500, np.float32)
    logits[0, IMAGENET.index(FIRST["knife"])] = 900
    probabilities = category_probabilities(logits, MAPPING, IMAGENET)
    assert np.isfinite(probabilities).all()
    assert MAPPING.names[probabilities[0].argmax()] == "knife"


def test_a_real_network_agrees_with_a_loop_of_its_own(root, tmp_path):
    """At 224 pixels nothing happens to an image but normalisation."""
    rng = np.random.default_rng(0)
    for path in root.glob("*/*.png"):
        blocks = np.kron(rng.integers(0, 256, (7, 7, 3)), np.ones((32, 32, 1))) * rng.random(3)
        Image.fromarray(blocks.astype(np.uint8)).save(path)
    torch.manual_seed(3)
    save_file(timm.create_model("test_resnet").state_dict(), tmp_path / "weights.safetensors")
    backbone = load_backbone(
        f"timm:test_resnet@{tmp_path / 'weights.safetensors'}", device="cpu", image_size=224
    )
    result = cue_conflict(backbone, open_cue_conflict(root, MAPPING), batch_size=16)
    names = MAPPING.names
    places = [[IMAGENET.index(i) for i in category.class_ids] for category in MAPPING.categories]
    expected = []
    for key in result.predictions["sample"]:
        pixels = normalize(pil_to_tensor(Image.open(root / key)) / 255, backbone.mean, backbone.std)
        with torch.no_grad():
            softmax = backbone.network(pixels[None]).softmax(1)[0]
        expected.append(names[int(torch.stack([softmax[place].mean() for place in places]).argmax())])
    assert result.predictions["predicted"].tolist() == expected
    assert len(set(expected)) > 2


def test_images_of_another_size_are_resized_to_the_input_size(root, seer, paint):
    for size in ((224, 224), (300, 200)):
        paint(root / "cat" / "cat1-chair2.png", FIRST["oven"], size)
        result = cue_conflict(seer(image_size=64), open_cue_conflict(root, MAPPING))
        assert result.counts["by neither"] == 1
    assert "size=64" in result.details["transform"]


def test_another_number_of_images_than_released_is_said(root):
    with pytest.warns(Warned, match="holds 48 images; released are 1,280"):
        open_cue_conflict(root, MAPPING)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cat1.png", "expected a name such as cat1-truck2.png"),
        ("cat1-spoon2.png", "a texture out of airplane, bear"),
        ("dog1-bear2.png", "of the shape 'cat'"),
        ("cat1-.png", "expected a name such as"),
    ],
)
def test_wrong_names_are_one_line(root, paint, name, message):
    paint(root / "cat" / name, FIRST["cat"])
    with pytest.raises(UserError, match=message) as caught:
        open_cue_conflict(root, MAPPING)
    assert str(caught.value).startswith(str(root / "cat" / name))
    assert "\n" not in str(caught.value)


def test_missing_and_empty_directories_are_one_line(root):
    shutil.rmtree(root / "bear")
    shutil.rmtree(root / "oven")
    with pytest.raises(UserError, match="lacks 2 of 16 directories, one for each shape: bear, oven"):
        open_cue_conflict(root, MAPPING)
    (root / "bear").mkdir()
    (root / "oven").mkdir()
    with pytest.raises(UserError, match="bear holds no image"):
        open_cue_conflict(root, MAPPING)


def test_hidden_files_and_other_kinds_of_files_do_not_count(root):
    (root / "cat" / "._cat1-chair2.png").write_bytes(b"")
    (root / "cat" / "notes.txt").write_text("")
    assert len(open_cue_conflict(root, MAPPING).images) == 32


def test_a_broken_image_is_named(root, seer):
    (root / "cat" / "cat1-chair2.png").write_bytes(b"not an image")
    with pytest.raises(UserError, match=r"cat/cat1-chair2\.png: not a usable image") as caught:
        cue_conflict(seer(), open_cue_conflict(root, MAPPING))
    assert "\n" not in str(caught.value)


def test_backbones_without_the_classes_are_refused(seer):
    with pytest.raises(UserError, match=r"backbone seer: it lacks \d+ of the 207 imagenet1k classes"):
        mapping_of("cue-conflict", seer(load_classes("imagenet100").ids))
    with pytest.raises(UserError, match=r"random test_resnet .*: its weights hold no classifier"):
        mapping_of("cue-conflict", load_backbone("random:test_resnet", device="cpu"))
    with pytest.raises(UserError, match="backbone seer: nothing says which classes its 1000 outputs are"):
        mapping_of("cue-conflict", replace(seer(), class_ids=None))
