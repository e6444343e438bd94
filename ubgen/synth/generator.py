"""The chain of engines that turns identities into scored images."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ubgen.classes import ClassList
from ubgen.config import require_directory
from ubgen.diffusion import initial_noise, sample_guided
from ubgen.errors import UserError
from ubgen.runtime import EngineSet, Network, run_rows
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
        classes = torch.tensor([item.class_index for item in items], device=self._engines.device)
        noise = [
            initial_noise(self._config.seed, item.class_index, item.image_index, self._latent_shape)
            for item in items
        ]
        latents = sample_guided(
            self._guided_unet(self._prompts[classes]),
            self._scheduler,
            torch.stack(noise).to(self._engines.device),
            steps=self._config.steps,
        )
        pixels = self._run("vae_decoder", "pixels", latents=latents)
        similarity = (self._run("clip_image", "features", pixels=pixels) * self._texts[classes]).sum(dim=-1)
        quality = self._run("qalign", "score", pixels=pixels)
        rows = zip(pixels.cpu().numpy(), similarity.tolist(), quality.tolist(), strict=True)
        return [Made(*row) for row in rows]

    def _guided_unet(self, cond: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        unet = self._engines["unet"]
        guidance = torch.tensor([self._config.guidance], dtype=torch.float32, device=unet.device)

        def noise(latents: Tensor, timestep: Tensor) -> Tensor:
            inputs = {"latents": latents, "timestep": timestep, "cond": cond}
            return run_rows(unet, {**inputs, "uncond": self._uncond, "guidance": guidance})["noise"]

        return noise

    def _run(self, name: str, output: str, **inputs: Tensor) -> Tensor:
        return run_rows(self._engines[name], inputs)[output]

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


def _row_shape(network: Network, name: str) -> tuple[int, ...]:
    spec = next(spec for spec in network.signature.inputs if spec.name == name)
    return tuple(int(size) for size in spec.shape[1:])  # type: ignore[arg-type]


def _batch(config: SynthConfig, unet: Network) -> int:
    """Images at a time."""
    rows = unet.signature.batch
    if config.batch == "best":
        return rows.best
    if not rows.min <= config.batch <= rows.max:
        raise UserError(
            f"--batch {config.batch}: the UNet of this engine takes {rows.min} to {rows.max} images"
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
