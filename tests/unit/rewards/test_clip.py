import json
import warnings
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file

from ubgen.core.errors import UserError, Warned
from ubgen.rewards import Clip, clip_preprocess

CONFIG = {
    "model_cfg": {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    },
    "preprocess_cfg": {},
}


def config(**model: object) -> dict:
    return {**CONFIG, "model_cfg": {**CONFIG["model_cfg"], **model}}


def write(directory: Path, content: dict, weights: dict[str, torch.Tensor]) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "open_clip_config.json").write_text(json.dumps(content))
    save_file(weights, directory / "open_clip_model.safetensors")
    return directory


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = open_clip.CLIP(**CONFIG["model_cfg"])
    return {name: tensor.contiguous() for name, tensor in model.state_dict().items()}


@pytest.fixture(scope="module")
def directory(tmp_path_factory, weights) -> Path:
    return write(tmp_path_factory.mktemp("weights") / "clip", CONFIG, weights)


@pytest.fixture(scope="module")
def clip(directory) -> Clip:
    return Clip.load(directory)


def test_features_are_open_clips_own(clip, weights):
    plain = open_clip.CLIP(**CONFIG["model_cfg"]).eval()
    plain.load_state_dict(weights)
    images, texts = torch.rand(2, 3, 64, 64), ["a cat", "photo of dog"]
    with torch.no_grad():
        torch.testing.assert_close(clip.encode_image(images), plain.encode_image(clip_preprocess(images, 32)))
        tokens = open_clip.SimpleTokenizer(context_length=12)(texts)
        torch.testing.assert_close(clip.encode_text(texts), plain.encode_text(tokens))
    assert (clip.image_size, clip.dim) == (32, 24)


def test_images_carry_gradient_and_texts_do_not(clip):
    images = torch.rand(2, 3, 64, 48, requires_grad=True)
    clip.encode_image(images).square().sum().backward()
    assert images.grad.abs().amax((1, 2, 3)).min() > 0
    assert all(p.grad is None for p in clip.model.parameters())
    assert not clip.encode_text(["a cat"]).requires_grad


def test_texts_in_batches(clip):
    texts = [f"photo of thing {i}" for i in range(7)]
    torch.testing.assert_close(clip.encode_text(texts, batch=3), clip.encode_text(texts))
    assert clip.encode_text([]).shape == (0, 24)


def test_the_activation_follows_the_config(clip, tmp_path, weights):
    quick = Clip.load(write(tmp_path / "quick", config(quick_gelu=True), weights))
    images = torch.rand(2, 3, 32, 32)
    assert (quick.encode_image(images) - clip.encode_image(images)).abs().max() > 1e-4


def test_other_precision(clip, directory):
    half = Clip.load(directory, dtype=torch.bfloat16)
    images = torch.rand(2, 3, 64, 64)
    features = half.encode_image(images)
    assert features.dtype == torch.bfloat16
    assert torch.cosine_similarity(features.float(), clip.encode_image(images)).min() > 0.99


def test_missing_files_are_named(tmp_path, directory, weights):
    with pytest.raises(UserError, match="nowhere"):
        Clip.load(tmp_path / "nowhere")
    for name in ("open_clip_config.json", "open_clip_model.safetensors"):
        incomplete = write(tmp_path / "clip", CONFIG, weights)
        (incomplete / name).unlink()
        with pytest.raises(UserError, match=name):
            Clip.load(incomplete)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("visual.proj", None),
        ("visual.proj", torch.zeros(32, 23)),
        ("extra", torch.zeros(1)),
        ("visual.positional_embedding", torch.zeros(26, 32)),  # of a 40 px network: would be interpolated
        ("positional_embedding", torch.zeros(16, 16)),  # of a longer text
    ],
)
def test_weights_of_another_network_are_refused(tmp_path, directory, name, tensor):
    state = load_file(directory / "open_clip_model.safetensors") | {name: tensor}
    changed = write(tmp_path / "clip", CONFIG, {k: v for k, v in state.items() if v is not None})
    with pytest.raises(UserError, match=name.split(".")[-1]) as error:
        Clip.load(changed)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "KeyError: 'model_cfg'"),
        (config(text_cfg={"hf_model_name": "some/model"}), "would be downloaded"),
        (config(vision_cfg={"image_size": [32, 16]}), "whole numbers"),
        (CONFIG | {"preprocess_cfg": {"mean": [0.5, 0.5, 0.5]}}, "preprocess_cfg.mean"),
        (
            CONFIG | {"preprocess_cfg": {"interpolation": "bilinear"}},
            "preprocess_cfg.interpolation is 'bilinear'",
        ),
        (CONFIG | {"preprocess_cfg": {"size": 336}}, "preprocess_cfg.size is 336; only 32 is supported"),
    ],
)
def test_a_config_that_we_cannot_follow(tmp_path, weights, content, message):
    with pytest.raises(UserError, match=message):
        Clip.load(write(tmp_path / "clip", content, weights))


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


@pytest.mark.parametrize("name", ["open_clip_config.json", "open_clip_model.safetensors", "tokenizer.json"])
def test_a_git_lfs_pointer_is_named(tmp_path, weights, name):
    directory = write(tmp_path / "clip", CONFIG, weights)
    (directory / name).write_bytes(LFS)
    with pytest.raises(UserError, match=f"{name} is a Git LFS pointer"):
        Clip.load(directory)


def test_a_cut_off_file_and_a_json_file_that_is_none(tmp_path, weights):
    directory = write(tmp_path / "clip", CONFIG, weights)
    file = directory / "open_clip_model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(
        UserError, match=r"open_clip_model\.safetensors has \d+ bytes where its header says \d+"
    ):
        Clip.load(directory)
    (directory / "open_clip_config.json").write_text("model_cfg: {}")
    with pytest.raises(UserError, match=r"open_clip_config\.json is not valid JSON"):
        Clip.load(directory)


def test_weights_that_are_not_finite_are_named(tmp_path, weights):
    broken = weights["visual.proj"].clone()
    broken[0, 0] = float("nan")
    directory = write(tmp_path / "clip", CONFIG, weights | {"visual.proj": broken})
    with pytest.raises(UserError, match=r"'visual\.proj' holds NaN or infinity \(1 of 768 values\)"):
        Clip.load(directory)


def test_openai_weights_without_quick_gelu_are_warned_of(tmp_path):
    """Known by OpenAI's sizes and by values that float16 holds exactly."""
    vision = {"image_size": 32, "layers": 12, "width": 768, "patch_size": 32, "mlp_ratio": 0.125}
    text = {"context_length": 12, "vocab_size": 512, "width": 16, "heads": 2, "layers": 1}
    sizes = {"embed_dim": 512, "vision_cfg": vision, "text_cfg": text}
    state = {n: t.contiguous() for n, t in open_clip.CLIP(**sizes).state_dict().items()}
    rounded = {n: t.half().float() for n, t in state.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error", Warned)
        Clip.load(write(tmp_path / "laion", {"model_cfg": sizes}, state))
        Clip.load(write(tmp_path / "quick", {"model_cfg": {**sizes, "quick_gelu": True}}, rounded))
    with pytest.warns(Warned, match=r"openai.open_clip_config\.json does not set quick_gelu"):
        Clip.load(write(tmp_path / "openai", {"model_cfg": sizes}, rounded))
