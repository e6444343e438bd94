"""What an engine is timed on: real prompts, noise by identity, and what its own networks make of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ubgen.core.classes import ClassList, load_classes
from ubgen.diffusion import initial_noise, sample_guided
from ubgen.runtime import EngineSet, Network, run_rows
from ubgen.synth import SynthConfig
from ubgen.synth.generator import Generator
from ubgen.synth.plan import Item

CLASSES = "imagenet100"  # the names are prompts here, nothing more
_SHORT = 4  # sampling steps of the latents that the decoder is timed on


@dataclass(frozen=True)
class Settings:
    """`batch` rows of each network, clipped to what it takes; None: what it was made for."""

    batch: int | None
    steps: int
    guidance: float


class Workload:
    """Holds the inputs of every network, and runs the denoising loop and the whole chain on the engines."""

    def __init__(self, engines: EngineSet, settings: Settings) -> None:
        self.engines, self.settings = engines, settings
        self.images = self.rows("unet")
        self.classes: ClassList = load_classes(CLASSES)
        self.items = [Item(i, i % len(self.classes), i // len(self.classes)) for i in range(self.images)]
        self.scheduler = _scheduler(engines.path)
        self._generator = Generator(engines, self.classes, self._synth_config())
        self.inputs = self._inputs()

    def rows(self, name: str) -> int:
        batch = self.engines[name].signature.batch
        wanted = batch.best if self.settings.batch is None else self.settings.batch
        return max(batch.min, min(wanted, batch.max))

    def names(self, count: int) -> list[str]:
        return [self.classes.names[i % len(self.classes)] for i in range(count)]

    def noise(self) -> Tensor:
        shape = _row_shape(self.engines["unet"], "latents")
        seeds = [initial_noise(0, item.class_index, item.image_index, shape) for item in self.items]
        return torch.stack(seeds).to(self.engines.device)

    def denoise(self, noise: Tensor, steps: int) -> Tensor:
        """The engine's loop."""
        unet, prompts = (
            self.engines["unet"],
            {n: self.inputs["unet"][n] for n in ("cond", "uncond", "guidance")},
        )

        def predict(latents: Tensor, timestep: Tensor) -> Tensor:
            return run_rows(unet, {"latents": latents, "timestep": timestep, **prompts})["noise"]

        return sample_guided(predict, self.scheduler, noise, steps=steps)

    def chain(self) -> np.ndarray:
        """From identities to scored images, as ubgen-synth makes them: pixels (B,H,W,3) uint8, on the host."""
        made = self._generator.make(self.items)
        return torch.stack([image.pixels for image in made]).cpu().numpy()

    def _inputs(self) -> dict[str, dict[str, Tensor]]:
        device = self.engines.device
        ids = _tokenize(self.engines, [*self.names(max(self.images, self.rows("text_encoder"))), ""])
        embeddings = run_rows(self.engines["text_encoder"], {"input_ids": ids})["embeddings"]
        noise = self.noise()
        timestep = torch.full((self.images,), 501.0, device=device)
        prompts = {"cond": embeddings[: self.images], "uncond": embeddings[-1:]}
        guidance = torch.tensor([self.settings.guidance], dtype=torch.float32, device=device)
        self.inputs = {"unet": {"latents": noise, "timestep": timestep, **prompts, "guidance": guidance}}
        latents = self.denoise(noise, _SHORT)
        pixels = run_rows(self.engines["vae_decoder"], {"latents": latents})["pixels"]
        texts = [f"photo of {name}" for name in self.names(self.rows("clip_text"))]
        whole = {
            "text_encoder": {"input_ids": ids.to(device)},
            "vae_decoder": {"latents": latents},
            "clip_image": {"pixels": pixels},
            "clip_text": {"tokens": _clip_tokenizer(self.engines.path)(texts).to(device)},
            "qalign": {"pixels": pixels},
        }
        return self.inputs | {
            name: {key: _repeated(tensor, self.rows(name)) for key, tensor in given.items()}
            for name, given in whole.items()
        }

    def _synth_config(self) -> SynthConfig:
        settings = self.settings
        return SynthConfig(
            self.engines.path,
            CLASSES,
            per_class=1,
            out="",  # nothing is written
            batch=self.images,
            steps=settings.steps,
            guidance=settings.guidance,
            device=self.engines.device,
        )


def _repeated(tensor: Tensor, rows: int) -> Tensor:
    """The first `rows` rows, beginning again where there are fewer."""
    return tensor[torch.arange(rows, device=tensor.device) % len(tensor)]


def _row_shape(network: Network, name: str) -> tuple[int, ...]:
    spec = next(spec for spec in network.signature.inputs if spec.name == name)
    return tuple(int(size) for size in spec.shape[1:])  # type: ignore[arg-type]


def _tokenize(engines: EngineSet, prompts: Sequence[str]) -> Tensor:
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(engines.path / "tokenizer", local_files_only=True)
    (length,) = _row_shape(engines["text_encoder"], "input_ids")
    tokens = tokenizer(
        list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    )
    return tokens.input_ids


def _clip_tokenizer(engine: Path) -> Any:
    import open_clip

    return open_clip.get_tokenizer(f"local-dir:{engine / 'clip'}")


def _scheduler(engine: Path) -> Any:
    from diffusers import PNDMScheduler

    return PNDMScheduler.from_pretrained(engine / "scheduler", local_files_only=True)
