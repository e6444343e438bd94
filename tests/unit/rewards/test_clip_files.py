"""CLIP in transformers' layout: the same network as in open_clip's, and the same complaints."""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer
from safetensors.torch import load_file, save_file
from transformers import CLIPModel, CLIPTokenizer

from ubgen.core.classes import load_classes
from ubgen.core.errors import UserError, Warned
from ubgen.rewards import Clip
from ubgen.rewards.clip_files import clip_tokenizer, find_clip, meta_clip

Write = Callable[..., Path]
TEXTS = ["photo of a cat", "Crane", "photo of drake's egg & 2 red wines " * 3]
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory, write_transformers_clip: Write) -> Path:
    torch.manual_seed(0)
    return write_transformers_clip(tmp_path_factory.mktemp("clip") / "transformers")


@pytest.fixture
def copy(directory: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(directory, tmp_path / "clip"))


def features(clip: Clip) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.rand(3, 3, 48, 48, generator=torch.Generator().manual_seed(1))
    return clip.encode_image(images), clip.encode_text(TEXTS)


def change(file: Path, **values: Any) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**content, **values}), encoding="utf-8")


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("end", [2, 49407, 267])
def test_features_are_those_of_transformers(
    tmp_path: Path, write_transformers_clip: Write, activation: str, end: int
) -> None:
    """`end`: the old notation, the last id of the vocabulary, and a comma (267), of which the first counts."""
    torch.manual_seed(2)
    tower = {"hidden_act": activation, "layer_norm_eps": 1e-3}
    sections = {"vision_config": tower, "text_config": {**tower, "eos_token_id": end}}
    directory = write_transformers_clip(tmp_path / "clip", **sections)
    peer = CLIPModel.from_pretrained(directory).eval()
    clip = Clip.load(directory)
    pixels, tokens = torch.randn(3, 3, 32, 32), clip.tokenizer(["a , b", "c , d , e"])
    with torch.no_grad():
        expected = peer.get_image_features(pixels).pooler_output, peer.get_text_features(tokens).pooler_output
    torch.testing.assert_close(clip.encode_pixels(pixels), expected[0], atol=1e-5, rtol=1e-5)
    assert (tokens == (end if end != 2 else 49407)).any()
    torch.testing.assert_close(clip.model.encode_text(tokens), expected[1], atol=1e-5, rtol=1e-5)


def test_the_same_weights_in_both_layouts_give_the_same_features(directory: Path, tmp_path: Path) -> None:
    ours = Clip.load(directory)
    assert (ours.image_size, ours.dim) == (32, 24)
    other = tmp_path / "open_clip"
    other.mkdir()
    config = find_clip(directory).model_cfg
    (other / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    state = {name: tensor.contiguous() for name, tensor in ours.model.state_dict().items()}
    save_file(state, other / "open_clip_model.safetensors")
    for mine, theirs in zip(features(ours), features(Clip.load(other)), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


def test_names_are_tokenised_as_by_open_clip_with_and_without_tokenizer_json(copy: Path) -> None:
    texts = [f"photo of {name}" for name in load_classes("imagenet1k").names] + TEXTS
    expected = SimpleTokenizer(context_length=16)(texts)
    assert not (copy / "tokenizer.json").exists()
    torch.testing.assert_close(clip_tokenizer(copy)(texts), expected)
    CLIPTokenizer.from_pretrained(copy).save_pretrained(copy)
    (copy / "vocab.json").unlink()
    torch.testing.assert_close(clip_tokenizer(copy)(texts), expected)


def test_older_files_hold_position_ids_and_half_precision(copy: Path) -> None:
    file = copy / "model.safetensors"
    tensors = load_file(file)
    ids = {f"{tower}_model.embeddings.position_ids": torch.arange(9)[None] for tower in ("text", "vision")}
    save_file({name: t.half() for name, t in tensors.items()} | ids, file, {"format": "pt"})
    half = features(Clip.load(copy))
    save_file({name: t.half().float() for name, t in tensors.items()}, file, {"format": "pt"})
    for mine, theirs in zip(half, features(Clip.load(copy)), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("layout", ["shards", "bin", "bin shards"])
def test_shards_and_pickles(directory: Path, copy: Path, layout: str) -> None:
    tensors = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    if layout == "shards":
        CLIPModel.from_pretrained(directory).save_pretrained(copy, max_shard_size="2MB")
        assert len(list(copy.glob("model-*.safetensors"))) > 1
    elif layout == "bin":
        torch.save(tensors, copy / "pytorch_model.bin")
    else:
        for number, names in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2]), start=1):
            torch.save({n: tensors[n] for n in names}, copy / f"pytorch_model-0000{number}-of-00002.bin")
    for mine, theirs in zip(features(Clip.load(copy)), features(Clip.load(directory)), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_directory_with_both_configs_is_read_by_the_weights_that_it_has(
    directory: Path, copy: Path
) -> None:
    (copy / "open_clip_config.json").write_text(json.dumps({"model_cfg": {}}))
    assert find_clip(copy).is_transformers
    shutil.copyfile(copy / "model.safetensors", copy / "open_clip_model.safetensors")
    with pytest.raises(UserError, match="not an open_clip config"):
        find_clip(copy)


def test_a_pickle_of_open_clip_is_named_with_the_command_that_converts_it(tmp_path: Path) -> None:
    (tmp_path / "open_clip_config.json").write_text("{}")
    (tmp_path / "open_clip_pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(UserError, match=r"no open_clip_model\.safetensors; convert .* python -c .*save_file"):
        find_clip(tmp_path)


def test_a_directory_of_neither_layout(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no open_clip_config\.json .* and no config\.json"):
        find_clip(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "vocab.json", "merges.txt"])
def test_a_git_lfs_pointer_is_named(copy: Path, name: str) -> None:
    (copy / name).write_bytes(LFS)
    with pytest.raises(UserError, match=f"{name} is a Git LFS pointer"):
        find_clip(copy)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("visual_projection.weight", None, "'visual_projection.weight' is missing"),
        ("text_model.encoder.layers.0.self_attn.k_proj.bias", None, r"k_proj\.bias' is missing"),
        (
            "visual_projection.weight",
            torch.zeros(24, 31),
            r"the shape \(24, 31\), config.json needs \(24, 32\)",
        ),
        ("vision_model.embeddings.position_embedding.weight", torch.zeros(10, 32), r"needs \(5, 32\)"),
        ("vision_model.head.weight", torch.zeros(1), "unexpected tensor 'vision_model.head.weight'"),
    ],
)
def test_weights_of_another_network_are_refused(
    copy: Path, name: str, tensor: torch.Tensor | None, message: str
) -> None:
    state = load_file(copy / "model.safetensors") | {name: tensor}
    save_file({k: v for k, v in state.items() if v is not None}, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=message):
        Clip.load(copy)
    with pytest.raises(UserError, match=message):
        meta_clip(find_clip(copy))


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("config.json", {"model_type": "siglip"}, r"model_type is 'siglip'; expected 'clip'"),
        ("config.json", {"model_type": "clip_vision_model"}, "both towers in one directory"),
        (
            "config.json",
            {"vision_config": {"hidden_act": "relu"}},
            "'quick_gelu' or 'gelu', the same in both",
        ),
        ("config.json", {"vision_config": {"hidden_act": "gelu"}}, "it is 'gelu' and 'quick_gelu'"),
        ("preprocessor_config.json", {"image_mean": [0.5, 0.5, 0.5]}, "image_mean is"),
        ("preprocessor_config.json", {"resample": 2}, "resample is 2; only 3 is supported"),
        ("preprocessor_config.json", {"size": {"shortest_edge": 336}}, "size is"),
    ],
)
def test_a_config_that_we_cannot_follow(copy: Path, file: str, values: dict[str, Any], message: str) -> None:
    change(copy / file, **values)
    with pytest.raises(UserError, match=message):
        find_clip(copy)


def test_a_vocabulary_larger_than_the_table_of_the_network(copy: Path) -> None:
    """Such a tokenizer would name rows that are not there."""
    change(copy / "vocab.json", **{"a piece of another": 49408})
    with pytest.raises(UserError, match=r"49409 tokens, config\.json's vocab_size is 49408"):
        Clip.load(copy)


def test_a_tokenizer_that_is_missing(copy: Path) -> None:
    (copy / "merges.txt").unlink()
    with pytest.raises(UserError, match=r"merges\.txt: no such file; expected tokenizer\.json, or"):
        find_clip(copy)


def test_openai_weights_without_quick_gelu_are_warned_of(
    tmp_path: Path, write_transformers_clip: Write
) -> None:
    sizes = {"num_hidden_layers": 12, "hidden_size": 768, "num_attention_heads": 12, "patch_size": 32}
    for name, activation in (("quick", "quick_gelu"), ("plain", "gelu")):
        directory = write_transformers_clip(
            tmp_path / name,
            vision_config={**sizes, "hidden_act": activation},
            text_config={"hidden_act": activation},
        )
        change(directory / "config.json", projection_dim=512)
        file = directory / "model.safetensors"
        tensors = {n: t.half().float() for n, t in load_file(file).items()}
        tensors |= {"visual_projection.weight": torch.zeros(512, 768)}
        save_file(tensors | {"text_projection.weight": torch.zeros(512, 16)}, file, {"format": "pt"})
    with warnings.catch_warnings():
        warnings.simplefilter("error", Warned)
        Clip.load(tmp_path / "quick")
    with pytest.warns(Warned, match=r'config\.json sets hidden_act to "gelu", but .*set hidden_act to'):
        Clip.load(tmp_path / "plain")
