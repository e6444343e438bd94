"""A complete set of random networks, so small that an update takes a fraction of a second."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPTokenizer

from ubgen.core.config import to_dict
from ubgen.rewards import QAlign
from ubgen.train import (
    DiscriminatorConfig,
    GeneratorConfig,
    NetworkPaths,
    OutputConfig,
    RolloutConfig,
    TrainConfig,
    train,
)

GOLDEN = Path(__file__).parents[2] / "golden"
CLIP_CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 32, "patch_size": 8, "head_width": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="session")
def networks(tmp_path_factory: pytest.TempPathFactory) -> NetworkPaths:
    """16x16 images, 4x8x8 latents."""
    root = tmp_path_factory.mktemp("networks")
    torch.manual_seed(0)
    shutil.copytree(
        GOLDEN / "reference" / "model", root / "stable-diffusion", ignore=shutil.ignore_patterns("lora")
    )
    write_tokenizer(root / "stable-diffusion" / "tokenizer")
    write_clip(root / "clip")
    write_qalign(root / "qalign")
    return NetworkPaths(*(str(root / name) for name in ("stable-diffusion", "clip", "qalign")))


@pytest.fixture(scope="session")
def class_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("classes") / "classes.txt"
    path.write_text("cat\ndog\nbird\nfish\ncrane\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def config(networks: NetworkPaths, class_file: Path) -> TrainConfig:
    """2 warm-up and 4 more updates, with checkpoints after 2, 4 and 6."""
    return TrainConfig(
        networks=networks,
        classes=str(class_file),
        batch_size=2,
        max_updates=4,
        precision="no",
        device="cpu",
        rollout=RolloutConfig(steps=4, grad_steps=2, gradient_checkpointing=False),
        generator=GeneratorConfig(lora_rank=2, lr=1e-3),
        discriminator=DiscriminatorConfig(lr=1e-3, warmup_updates=2),
        output=OutputConfig(grid_every=2, grid_classes=3, grid_steps=2, checkpoint_every=2),
    )


@pytest.fixture(scope="session")
def finished(config: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a whole, uninterrupted run of `config`. Tests must not write to it."""
    out = tmp_path_factory.mktemp("run") / "train"
    assert train(config, out)
    return out


@pytest.fixture(scope="session")
def write_recipe() -> Callable[[TrainConfig, Path], Path]:
    """A configuration as a recipe file."""

    def write(config: TrainConfig, path: Path) -> Path:
        path.write_text(_toml(to_dict(config)), encoding="utf-8")
        return path

    return write


def with_options(config: TrainConfig, table: str, **values: Any) -> TrainConfig:
    """`config` with some options of one of its tables changed."""
    return dataclasses.replace(config, **{table: dataclasses.replace(getattr(config, table), **values)})


@pytest.fixture(scope="session")
def change() -> Callable[..., TrainConfig]:
    return with_options


def _toml(values: dict[str, Any]) -> str:
    plain = {key: value for key, value in values.items() if not isinstance(value, dict) and value is not None}
    lines = [f"{key} = {json.dumps(value)}" for key, value in plain.items()]
    tables = {key: value for key, value in values.items() if isinstance(value, dict)}
    return "\n".join([*lines, *(f"[{key}]\n{_toml(value)}" for key, value in tables.items())])


def write_tokenizer(directory: Path) -> None:
    """Letters, letters that end a word, digits and two special tokens: the text encoder knows 64 ids."""
    letters = [chr(ord("a") + i) for i in range(26)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), *map(str, range(10))]
    vocabulary = {word: i for i, word in enumerate(words)} | {"<|startoftext|>": 62, "<|endoftext|>": 63}
    directory.mkdir()
    (directory / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (directory / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    CLIPTokenizer.from_pretrained(directory, model_max_length=16).save_pretrained(directory)


def write_clip(directory: Path) -> None:
    directory.mkdir()
    text = json.dumps({"model_cfg": CLIP_CONFIG, "preprocess_cfg": {}})
    (directory / "open_clip_config.json").write_text(text, encoding="utf-8")
    tensors = open_clip.model.CLIP(**CLIP_CONFIG).state_dict()
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, directory / "open_clip_model.safetensors")


def write_qalign(directory: Path) -> None:
    values = json.loads((GOLDEN / "qalign" / "config.json").read_text(encoding="utf-8"))
    values["scoring"]["prompt_ids"] = [1, 5, 7, values["scoring"]["image_token_index"], 9, 11]
    QAlign.from_config(values).save(directory)
