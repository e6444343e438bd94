"""The chain of engines that turns identities into scored images."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ubgen.core.classes import ClassList
from ubgen.core.config import require_directory
from ubgen.core.errors import UserError
from ubgen.diffusion import initial_noise, sample_guided
from ubgen.runtime import Dim, EngineSet, Network, run_rows
from ubgen.synth.config import SynthConfig
from ubgen.synth.plan import Item
from ubgen.synth.selection import BROKEN, Made

NETWORKS = ("text_encoder", "unet", "vae_decoder", "clip_image", "clip_text", "qalign")


@dataclass(frozen=True)
class Scored:
    """A batch, filled up. `pixels` (B,H,W,3) uint8; the others (B,): `similarity` to "photo of {class}" in CLIP's
    space, `quality` in [1, 5], whether the latents are `finite` and the image `constant` (of one colour)."""

    pixels: Tensor
    similarity: Tensor
    quality: Tensor
    finite: Tensor
    constant: Tensor

    def rows(self, count: int) -> list[Made]:
        """The first `count` images, `pixels` as views; waits for the device."""
        columns = (self.similarity, self.quality, self.finite, self.constant)
        rows = zip(self.pixels, *(column.tolist() for column in columns), strict=True)
        return [
            Made(pixels, similarity, quality, None if finite and not constant else BROKEN[finite])
            for pixels, similarity, quality, finite, constant in itertools.islice(rows, count)
        ]


class Generator:
    """Holds the engines and the encoded prompts; everything about an image follows from its `Item`.

    Batches of fewer than `batch` images are filled up with copies of the last one: every call of a network is of the
    same size, as compilers may choose other arithmetic for other sizes.
    """

    def __init__(
        self,
        engines: EngineSet,
        classes: ClassList,
        config: SynthConfig,
        prompts: Sequence[str] | None = None,
        lanes: int = 1,
    ) -> None:
        for name in NETWORKS:
            if name not in engines:
                raise UserError(f"{engines.path} has no network {name!r}; export it again")
        self.lanes = lanes
        self._engines = engines
        self._config = config
        self._scheduler = _scheduler(engines.path)
        self.latent_shape = _row_shape(engines["unet"], "latents")
        self.batch = images_at_a_time(config, engines["unet"].signature.batch)
        self._prompts = self._encode_prompts(prompts or classes.names)
        self._uncond = self._encode_prompts([""])
        self._texts = self._encode_texts(classes.names)

    @property
    def device(self) -> torch.device:
        return torch.device(self._engines.device)

    def make(self, items: Sequence[Item]) -> list[Made]:
        """Images of `items`, which may mix classes freely: no row depends on the others."""
        latents = self.denoise(items)
        return self.score(items, latents, self.decode(latents)).rows(len(items))

    def denoise(self, items: Sequence[Item]) -> Tensor:
        """(batch,C,h,w), the latents of at most `batch` images first."""
        noise = torch.stack([self._noise(item) for item in self._filled(items)])
        if self.device.type == "cuda":
            noise = noise.pin_memory()
        return sample_guided(
            self._guided_unet(self._prompts[self._classes(items)]),
            self._scheduler,
            noise.to(self.device, non_blocking=True),
            steps=self._config.steps,
        )

    def decode(self, latents: Tensor) -> Tensor:
        """(B,H,W,3) uint8: the decoder's graph ends in bytes, so that no more than these leave the device."""
        return self._run("vae_decoder", "pixels", latents=latents)

    def score(self, items: Sequence[Item], latents: Tensor, pixels: Tensor) -> Scored:
        """What is known of each row, still on the device."""
        texts = self._texts[self._classes(items)]
        flat = pixels.flatten(1, 2)
        return Scored(
            pixels,
            (self._run("clip_image", "features", pixels=pixels) * texts).sum(dim=-1),
            self._run("qalign", "score", pixels=pixels),
            latents.flatten(1).isfinite().all(dim=1),
            (flat.amax(dim=1) == flat.amin(dim=1)).all(dim=1),
        )

    def same_bits(self) -> dict[str, bool]:
        """Whether a row comes out the same to the last bit at another "position" of a batch, and in another "size".

        Tried on single calls of every network. Where position does not matter, images do not depend on the number of
        workers; where size does not matter either, they do not depend on --batch.
        """
        items = [Item(i, i % len(self._texts), i // len(self._texts)) for i in range(self.batch)]
        whole, turned = self._single_calls(items), self._single_calls(items[::-1])
        first = self._single_calls(items[:1], fill=False)
        return {
            "position": all(torch.equal(a, b.flip(0)) for a, b in zip(whole, turned, strict=True)),
            "size": all(torch.equal(a[:1], b) for a, b in zip(whole, first, strict=True)),
        }

    def _single_calls(self, items: Sequence[Item], fill: bool = True) -> list[Tensor]:
        classes = self._classes(items, fill)
        noise = torch.stack([self._noise(item) for item in items]).to(self.device)
        timestep = torch.full((len(items),), 501.0, device=self.device)
        latents = self._guided_unet(self._prompts[classes])(noise, timestep)
        pixels = self.decode(noise)
        features = self._run("clip_image", "features", pixels=pixels)
        return [latents, pixels, features, self._run("qalign", "score", pixels=pixels)]

    def _filled(self, items: Sequence[Item]) -> list[Item]:
        return [*items, *[items[-1]] * (self.batch - len(items))]

    def _classes(self, items: Sequence[Item], fill: bool = True) -> Tensor:
        """(batch,) class indices."""
        rows = self._filled(items) if fill else items
        return torch.tensor([item.class_index for item in rows], device=self.device)

    def _noise(self, item: Item) -> Tensor:
        return initial_noise(
            self._config.seed, item.class_index, item.image_index, self.latent_shape, item.attempt
        )

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


def images_at_a_time(config: SynthConfig, rows: Dim) -> int:
    """What --batch means for a UNet that takes so many `rows`; UserError where it does not take that many."""
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
