"""The engine's pipeline on identities: batches of scored images."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ubgen.core.classes import ClassList
from ubgen.core.errors import UserError
from ubgen.diffusion import initial_noise
from ubgen.runtime import Dim, EngineSet
from ubgen.runtime.pipeline import Pipeline
from ubgen.synth.config import SynthConfig
from ubgen.synth.plan import Item
from ubgen.synth.selection import BROKEN, Made


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
    """Everything about an image follows from its `Item`; the prompts of all classes are encoded once.

    Batches of fewer than `batch` images are filled up with copies of the last one: every call of a network is of the
    same size, as compilers may choose other arithmetic for other sizes. `concurrency` threads may call it at a time.
    """

    def __init__(
        self,
        engines: EngineSet,
        classes: ClassList,
        config: SynthConfig,
        prompts: Sequence[str] | None = None,
        concurrency: int = 1,
    ) -> None:
        self._pipeline = Pipeline(engines, engines.path, steps=config.steps, guidance=config.guidance)
        self._seed = config.seed
        self.concurrency = concurrency
        self.device = self._pipeline.device
        self.batch = images_at_a_time(config, self._pipeline.batch)
        self._prompts = self._pipeline.encode_prompts(prompts or classes.names)
        self._photos = self._pipeline.encode_photos(classes.names)

    def make(self, items: Sequence[Item]) -> list[Made]:
        """Images of `items`, which may mix classes freely: no row depends on the others."""
        latents = self.denoise(items)
        return self.score(items, latents, self.decode(latents)).rows(len(items))

    def denoise(self, items: Sequence[Item]) -> Tensor:
        """(batch,C,h,w), the latents of at most `batch` images first."""
        noise = self.noise(items)
        if self.device.type == "cuda":
            noise = noise.pin_memory()
        return self._pipeline.denoise(noise, self._prompts[self._classes(items)])

    def noise(self, items: Sequence[Item]) -> Tensor:
        """(batch,C,h,w) on the CPU: what the images start from."""
        shape = self._pipeline.latent_shape
        rows = [
            initial_noise(self._seed, i.class_index, i.image_index, shape, i.attempt)
            for i in self._filled(items)
        ]
        return torch.stack(rows)

    def decode(self, latents: Tensor) -> Tensor:
        """(batch,H,W,3) uint8"""
        return self._pipeline.decode(latents)

    def score(self, items: Sequence[Item], latents: Tensor, pixels: Tensor) -> Scored:
        """What is known of each row, still on the device."""
        similarity, quality = self._pipeline.score(pixels, self._photos[self._classes(items)])
        flat = pixels.flatten(1, 2)
        return Scored(
            pixels,
            similarity,
            quality,
            latents.flatten(1).isfinite().all(dim=1),
            (flat.amax(dim=1) == flat.amin(dim=1)).all(dim=1),
        )

    def _filled(self, items: Sequence[Item]) -> list[Item]:
        return [*items, *[items[-1]] * (self.batch - len(items))]

    def _classes(self, items: Sequence[Item]) -> Tensor:
        """(batch,) class indices."""
        return torch.tensor([item.class_index for item in self._filled(items)], device=self.device)


def images_at_a_time(config: SynthConfig, rows: Dim) -> int:
    """What --batch means for a UNet that takes so many `rows`; UserError where it does not take that many."""
    if config.batch == "best":
        return rows.best
    if not rows.min <= config.batch <= rows.max:
        raise UserError(
            f"--batch {config.batch}: the UNet of this engine takes {rows.min} to {rows.max} images"
        )
    return config.batch
