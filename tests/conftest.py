"""What holds for all tests."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """GPU tests are skipped where there is none."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A folder's tests share fixtures, so one process runs them all.

    pytest-xdist 3.8's own groups (`--dist loadgroup`) have no effect, and say nothing, with pytest 9.2: they write to
    an attribute of a test that is not read any more.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFolder(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return nodeid.split("::")[0].rpartition("/")[0]

    return ByFolder(config, log)


@pytest.fixture(scope="session")
def write_transformers_clip() -> Callable[..., Path]:
    """A function that writes a CLIP directory as transformers does, with random weights and OpenAI's vocabulary.

    Its arguments: the directory, then sections of config.json, whose values replace ours.
    """
    return _write_transformers_clip


def _write_transformers_clip(directory: Path, **sections: dict[str, Any]) -> Path:
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    tower = {"intermediate_size": 40, "num_attention_heads": 2, "hidden_act": "quick_gelu"}
    vision = {**tower, "hidden_size": 32, "num_hidden_layers": 2, "image_size": 32, "patch_size": 16}
    text = {
        **tower,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "max_position_embeddings": 16,
        "eos_token_id": 2,
    }
    config = CLIPConfig(
        vision_config={**vision, **sections.pop("vision_config", {})},
        text_config={**text, **sections.pop("text_config", {})},
        projection_dim=24,
        **sections,
    )
    model = CLIPModel(config)
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms, too, so that none can be left out unseen
            parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(directory)
    size = config.vision_config.image_size
    CLIPImageProcessor(size=size, crop_size=size).save_pretrained(directory)
    _write_vocabulary(directory)
    return directory


def _write_vocabulary(directory: Path) -> None:
    """vocab.json and merges.txt, from the list that open_clip brings along."""
    from open_clip.tokenizer import SimpleTokenizer

    tokenizer = SimpleTokenizer()
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {names.get(piece, piece): i for piece, i in tokenizer.encoder.items()}
    merges = [" ".join(pair) for pair in sorted(tokenizer.bpe_ranks, key=tokenizer.bpe_ranks.__getitem__)]
    (directory / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (directory / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
