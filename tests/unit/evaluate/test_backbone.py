"""Backbones from runs, checkpoints of many writers, and what does not fit."""

import argparse
import json
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from ubgen.core.errors import UserError
from ubgen.evaluate.backbone import load_backbone
from ubgen.pretrain import Augmentation, PretrainConfig, pretrain

MODEL = "test_resnet"
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(5)
    return timm.create_model(MODEL, num_classes=7).eval()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of ubgen-pretrain."""
    root = tmp_path_factory.mktemp("run")
    for label in "ab":
        (root / "data" / label).mkdir(parents=True)
        for i in range(4):
            pixels = np.random.default_rng([ord(label), i]).integers(0, 256, (40, 40, 3), np.uint8)
            Image.fromarray(pixels).save(root / "data" / label / f"{i}.png")
    config = PretrainConfig(
        MODEL,
        image_size=32,
        epochs=2,
        warmup_epochs=1,
        batch_size=4,
        lr=0.05,
        augmentation=Augmentation(rand_augment=""),
        crop_ratio=0.9,
        device="cpu",
    )
    assert pretrain(config, root / "data", root / "backbone")
    return root / "backbone"


def same(backbone: object, network: nn.Module) -> bool:
    with torch.inference_mode():
        expected = network.forward_head(network.forward_features(IMAGES), pre_logits=True)
    return torch.allclose(backbone.features(backbone.on_device(IMAGES)).cpu(), expected, atol=1e-4)


def checkpoint(tmp_path: Path, content: object, name: str = "w.pth") -> str:
    torch.save(content, tmp_path / name)
    return f"timm:{MODEL}@{tmp_path / name}"


def test_a_run_of_pretraining(run: Path) -> None:
    average, raw = load_backbone(run, device="cpu"), load_backbone(run, device="cpu", weights="raw")
    assert (average.name, raw.name) == ("backbone", "backbone (raw)")
    for backbone, file in ((average, "model_ema.safetensors"), (raw, "model.safetensors")):
        reference = timm.create_model(MODEL, num_classes=2, checkpoint_path=str(run / file)).eval()
        assert same(backbone, reference)
        assert torch.allclose(backbone.logits(IMAGES), reference(IMAGES), atol=1e-4)
        assert (backbone.class_ids, backbone.image_size, backbone.crop_ratio) == (("a", "b"), 32, 0.9)
        assert backbone.features(IMAGES).shape == (2, backbone.dim)
    assert average.identity != raw.identity
    assert average.identity == load_backbone(str(run), device="cpu").identity


def test_an_unfinished_or_changed_run_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such directory; a backbone is"):
        load_backbone(tmp_path / "none")
    with pytest.raises(UserError, match="unfinished"):
        load_backbone(tmp_path)
    for name in ("manifest.json", "config.json"):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    with pytest.raises(UserError, match=r"model_ema\.safetensors: no such file"):
        load_backbone(tmp_path)
    (tmp_path / "model_ema.safetensors").write_bytes((run / "model_ema.safetensors").read_bytes()[:-9])
    with pytest.raises(UserError, match="bytes where its header says"):
        load_backbone(tmp_path)
    config = json.loads((run / "config.json").read_text())
    (tmp_path / "model_ema.safetensors").write_bytes((run / "model_ema.safetensors").read_bytes())
    for change, message in (
        ({"class_ids": ["a", "b", "c"]}, "3 class ids, but the network has 2 outputs"),
        (
            {"class_ids": ["a", "b", "c"], "timm": {"num_classes": 3}},
            r"'fc\.\w+' is .* where the network has 3",
        ),
        ({"architecture": "test_resnett"}, "did you mean 'test_resnet'"),
        ({"recipe": {}}, "not of ubgen-pretrain"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(UserError, match=message):
            load_backbone(tmp_path)


@pytest.mark.parametrize(
    "prefix", ["", "module.", "backbone.", "model.", "_orig_mod.module.", "model.backbone."]
)
@pytest.mark.parametrize("key", [None, "state_dict", "model", "model_ema"])
def test_prefixes_and_nesting(network: nn.Module, tmp_path: Path, prefix: str, key: str | None) -> None:
    state = {prefix + name: value for name, value in network.state_dict().items()}
    options = argparse.Namespace(lr=0.1)
    spec = checkpoint(tmp_path, {key: state, "epoch": 3, "args": options} if key else state)
    backbone = load_backbone(spec, device="cpu")
    assert same(backbone, network)
    assert (backbone.outputs, backbone.class_ids, backbone.name) == (7, None, f"{MODEL}@w")
    assert torch.allclose(backbone.logits(IMAGES), network(IMAGES), atol=1e-4)
    assert load_backbone(spec, classes=list("abcdefg")).class_ids == tuple("abcdefg")
    with pytest.raises(UserError, match="7 outputs, but the class list has 1000"):
        load_backbone(spec, classes="imagenet1k")


@pytest.mark.parametrize("nested", [True, False])
def test_of_two_sets_of_weights_the_chosen_one_is_taken(
    network: nn.Module, tmp_path: Path, nested: bool
) -> None:
    torch.manual_seed(6)
    other = timm.create_model(MODEL, num_classes=7).eval()
    if nested:
        content = {"model": network.state_dict(), "ema": {"module": other.state_dict()}}
    else:
        content = {f"model.{k}": v for k, v in network.state_dict().items()}
        content |= {f"ema.module.{k}": v for k, v in other.state_dict().items()}
    spec = checkpoint(tmp_path, content)
    assert same(load_backbone(spec, device="cpu", weights="raw"), network)
    assert same(load_backbone(spec, device="cpu", weights="ema"), other)


def test_the_classifier_may_be_missing_or_another_kind(network: nn.Module, tmp_path: Path) -> None:
    state = {name: value for name, value in network.state_dict().items() if not name.startswith("fc.")}
    counters = {name for name in state if name.endswith("num_batches_tracked")}
    for extra in ({}, {"fc.0.weight": torch.zeros(64, 64), "fc.2.weight": torch.zeros(8, 64)}):
        kept = {name: value for name, value in state.items() if name not in counters} | extra
        backbone = load_backbone(checkpoint(tmp_path, kept), device="cpu")
        assert same(backbone, network)
        assert (backbone.outputs, backbone.class_ids) == (0, None)
        with pytest.raises(UserError, match="no classifier"):
            backbone.logits(IMAGES)


def test_a_thousand_outputs_are_imagenets(tmp_path: Path) -> None:
    torch.manual_seed(1)
    save_file(timm.create_model(MODEL).state_dict(), tmp_path / "w.safetensors")
    backbone = load_backbone(f"timm:{MODEL}@{tmp_path / 'w.safetensors'}", device="cpu")
    assert backbone.class_ids[:2] == ("n01440764", "n01443537")
    assert len(backbone.class_ids) == backbone.outputs == 1000


def test_what_does_not_fit_is_one_line(network: nn.Module, tmp_path: Path) -> None:
    state = network.state_dict()
    first = "conv1.0.weight"
    cases: list[tuple[object, str]] = [
        ({k: v for k, v in state.items() if k != first}, f"tensor '{first}' is missing"),
        (state | {"neck.weight": torch.zeros(3)}, "tensor 'neck.weight' is not of test_resnet"),
        (state | {first: torch.zeros(5, 3, 3, 3)}, f"'{first}' is 5 x 3 x 3 x 3 where the network has 16 x"),
        ({"a.b": torch.zeros(3)}, "none of its tensors belongs to test_resnet (they are named like 'a.b'"),
        ({"fc.weight": state["fc.weight"]}, "none of its tensors belongs"),
        ({"epoch": 3}, "no weights found in it (it holds epoch)"),
        ([1, 2], "no weights found in it (it holds list)"),
        (state | {first: state[first] * np.nan}, f"tensor '{first}' holds NaN"),
        ({"state_dict": state, "hook": Path("x")}, "pickled objects besides tensors"),
    ]
    for content, message in cases:
        with pytest.raises(UserError, match=re.escape(message)) as raised:
            load_backbone(checkpoint(tmp_path, content))
        assert "\n" not in str(raised.value)
    (tmp_path / "w.pth").write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match=r"not a readable PyTorch checkpoint|pickled objects"):
        load_backbone(f"timm:{MODEL}@{tmp_path / 'w.pth'}")
    (tmp_path / "w.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    with pytest.raises(UserError, match="Git LFS pointer"):
        load_backbone(f"timm:{MODEL}@{tmp_path / 'w.safetensors'}")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("timm:test_resnet", "write timm:MODEL@FILE"),
        ("timm:test_resnett@x", "did you mean 'test_resnet'"),
        ("timm:test_resnet@none.pth", "none.pth: no such file"),
        ("random:nosuchnetwork", "timm has no 'nosuchnetwork'"),
        ("random:test_resnet@x", "the seed must be a whole number"),
        ("test_resnet", "a backbone is a directory of ubgen-pretrain, timm:MODEL@FILE"),
    ],
)
def test_specs_that_name_nothing(spec: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_backbone(spec)


def test_vision_transformer_gives_the_class_token(tmp_path: Path) -> None:
    torch.manual_seed(2)
    options = {"img_size": 32, "patch_size": 16}
    network = timm.create_model("vit_tiny_patch16_224", num_classes=0, **options).eval()
    torch.save(network.state_dict(), tmp_path / "v.pth")
    spec = f"timm:vit_tiny_patch16_224@{tmp_path / 'v.pth'}"
    backbone = load_backbone(spec, image_size=32, device="cpu")
    with torch.inference_mode():
        assert torch.allclose(backbone.features(IMAGES), network.forward_features(IMAGES)[:, 0], atol=1e-5)
    with pytest.raises(UserError, match="'pos_embed' is 1 x 5 x 192 where the network has 1 x 197 x 192"):
        load_backbone(spec)


def test_input_settings_come_from_timm_or_from_beside_the_weights(network: nn.Module, tmp_path: Path) -> None:
    spec = checkpoint(tmp_path, network.state_dict())
    known = timm.get_pretrained_cfg(MODEL)
    backbone = load_backbone(spec)
    assert (backbone.mean, backbone.image_size) == (known.mean, known.input_size[-1])
    assert (backbone.crop_ratio, backbone.interpolation) == (known.crop_pct, known.interpolation)
    settings = {
        "mean": [0.5, 0.4, 0.3],
        "crop_pct": 1.0,
        "input_size": [3, 64, 64],
        "interpolation": "bilinear",
    }
    (tmp_path / "config.json").write_text(json.dumps({"architecture": MODEL, "pretrained_cfg": settings}))
    other = load_backbone(spec)
    assert (other.mean, other.crop_ratio, other.image_size) == ((0.5, 0.4, 0.3), 1.0, 64)
    assert other.own_transform().interpolation == "bilinear"
    assert other.transform().interpolation == "bicubic"
    assert other.identity != backbone.identity


def test_a_random_network_must_be_asked_for() -> None:
    a, b, c = (load_backbone(f"random:{MODEL}{seed}", image_size=32) for seed in ("", "@0", "@1"))
    assert a.identity == b.identity != c.identity
    assert (a.name, c.name) == (f"random {MODEL} (seed 0)", f"random {MODEL} (seed 1)")
    with pytest.raises(UserError, match="no classifier"):
        a.logits(IMAGES)


def test_logits_have_the_digits_of_float32_under_autocast(tmp_path: Path) -> None:
    """Else the largest of 1,000 logits would often not be the only one."""
    torch.manual_seed(0)
    network = timm.create_model("test_resnet", num_classes=1000).eval()
    save_file(network.state_dict(), tmp_path / "w.safetensors")
    backbone = load_backbone(f"timm:test_resnet@{tmp_path / 'w.safetensors'}", device="cpu", precision="bf16")
    images = torch.randn(16, 3, 64, 64)
    logits = backbone.logits(images)
    assert logits.dtype == torch.float32
    assert (logits != logits.bfloat16().float()).float().mean() > 0.9
    with torch.inference_mode():
        exact = network(images)
    assert (logits - exact).abs().max() < 0.05 * exact.abs().max()
