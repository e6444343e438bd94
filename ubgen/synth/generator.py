"""The chain of engines that turns identities into scored images."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ubgen.classes import ClassList
from ubgen.config import require_directory
from ubgen.diffusion import initial_noise, sample
from ubgen.errors import UserError
from ubgen.runtime import EngineSet, Network
from ubgen.synth.config import SynthConfig
from ubgen.synth.plan import Item

NETWORKS = ("text_encoder", "unet", "vae_decoder", "clip_image", "clip_text", "qalign")


@dataclass(frozen=True)
class Made:
    """`pixels` (H,W,3) uint8; cosine similarity to "photo of {class}" in CLIP's space; quality in [1, 5]."""

    pixels: np.ndarray
    clip_similarity: float
    quality: float


class Generator:
    """Holds the engines and the encoded prompts; everything about an image follows from its `Item`."""

    def __init__(self, engines: EngineSet, classes: ClassList, config: SynthConfig) -> None:
        for name in NETWORKS:
            if name not in engines:
                raise UserError(f"{engines.path} has no network {name!r}; export it again")
        self._engines = engines
        self._config = config
        self._scheduler = _scheduler(engines.path)
        self._latent_shape = _row_shape(engines["unet"], "latents")
        self.batch = _batch(config, engines["unet"])
        self._prompts = self._encode_prompts(classes.names)
        self._uncond = self._encode_prompts([""])
        self._texts = self._encode_texts(classes.names)

    def make(self, items: Sequence[Item]) -> list[Made]:
        """Images of `items`, which may mix classes freely: no row depends on the others."""
        classes = torch.tensor([item.class_index for item in items])
        noise = [
            initial_noise(self._config.seed, item.class_index, item.image_index, self._latent_shape)
            for item in items
        ]
        latents = sample(
            self._unet,
            self._scheduler,
            torch.stack(noise),
            self._prompts[classes],
            self._uncond,
            steps=self._config.steps,
            guidance=self._config.guidance,
        )
        pixels = self._run("vae_decoder", "pixels", latents=latents)
        similarity = (self._run("clip_image", "features", pixels=pixels) * self._texts[classes]).sum(dim=-1)
        quality = self._run("qalign", "score", pixels=pixels)
        rows = zip(pixels.numpy(), similarity.tolist(), quality.tolist(), strict=True)
        return [Made(*row) for row in rows]

    def _unet(self, latents: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        inputs = {"latents": latents, "timestep": timestep.float(), "context": context}
        return self._engines["unet"].run(inputs)["noise"]

    def _run(self, name: str, output: str, **inputs: Tensor) -> Tensor:
        return run_in_chunks(self._engines[name], inputs)[output]

    def _encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        """(N,S,D), once for each class."""
        (length,) = _row_shape(self._engines["text_encoder"], "input_ids")
        tokenizer = _tokenizer(self._engines.path)
        tokens = tokenizer(
            list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        )
        return self._run("text_encoder", "embeddings", input_ids=tokens.input_ids)

    def _encode_texts(self, names: Sequence[str]) -> Tensor:
        """(N,D), L2-normalised."""
        tokens = _clip_tokenizer(self._engines.path)([f"photo of {name}" for name in names])
        return self._run("clip_text", "features", tokens=tokens)


def run_in_chunks(network: Network, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """`network.run` on any number of rows, in calls of at most as many as it takes."""
    largest = network.signature.batch.max
    chunks = zip(*(tensor.split(largest) for tensor in inputs.values()), strict=True)
    parts = [network.run(dict(zip(inputs, chunk, strict=True))) for chunk in chunks]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _row_shape(network: Network, name: str) -> tuple[int, ...]:
    spec = next(spec for spec in network.signature.inputs if spec.name == name)
    return tuple(int(size) for size in spec.shape[1:])  # type: ignore[arg-type]


def _batch(config: SynthConfig, unet: Network) -> int:
    """Images at a time; guidance gives the UNet two rows for each."""
    rows = unet.signature.batch
    if config.batch == "best":
        return max(1, rows.best // 2)
    if not rows.min <= 2 * config.batch <= rows.max:
        raise UserError(
            f"--batch {config.batch} needs {2 * config.batch} rows of the UNet; this engine takes "
            f"{rows.min}..{rows.max}, so at most --batch {rows.max // 2}"
        )
    return config.batch


def _scheduler(engine: Path) -> Any:
    from diffusers import PNDMScheduler

    directory = require_directory(engine / "scheduler", "the engine's scheduler", "scheduler_config.json")
    return PNDMScheduler.from_pretrained(directory, local_files_only=True)


def _tokenizer(engine: Path) -> Any:
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(engine / "tokenizer", local_files_only=True)


def _clip_tokenizer(engine: Path) -> Any:
    import open_clip

    return open_clip.get_tokenizer(f"local-dir:{engine / 'clip'}")
