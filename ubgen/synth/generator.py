"""The engine's pipeline on identities: batches of scored images."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ubgen import runtime
from ubgen.core.classes import ClassList
from ubgen.core.errors import UserError
from ubgen.core.stage import read_manifest
from ubgen.diffusion import initial_noise
from ubgen.runtime import Dim, EngineSet, Signature
from ubgen.runtime.engine import check_engine
from ubgen.runtime.pipeline import NETWORKS, Pipeline
from ubgen.synth.config import SynthConfig
from ubgen.synth.plan import Item, Plan
from ubgen.synth.selection import BROKEN, Made


@dataclass(frozen=True)
class Scored:
    """A batch, filled up. `pixels` (B,H,W,3) uint8; the others (B,): `similarity` to "photo of {class}" in CLIP's
    space, `quality` in [1, 5], whether the latents are `finite` and the image `constant` (of one colour); and the CLIP
    image `features` (B,D), L2-normalised."""

    pixels: Tensor
    similarity: Tensor
    quality: Tensor
    finite: Tensor
    constant: Tensor
    features: Tensor

    def rows(self, count: int) -> list[Made]:
        """The first `count` images, `pixels` as views; waits for the device."""
        columns = (self.similarity, self.quality, self.finite, self.constant)
        features = self.features.half().cpu().numpy()
        rows = zip(self.pixels, features, *(column.tolist() for column in columns), strict=True)
        return [
            Made(pixels, similarity, quality, None if finite and not constant else BROKEN[finite], row)
            for pixels, row, similarity, quality, finite, constant in itertools.islice(rows, count)
        ]


class ImageSource(Protocol):
    """What a worker needs of `Generator`. It is called by `concurrency` threads at a time."""

    batch: int
    concurrency: int

    @property
    def device(self) -> torch.device: ...
    def denoise(self, items: Sequence[Item]) -> Tensor: ...
    def decode(self, latents: Tensor) -> Tensor: ...
    def score(self, items: Sequence[Item], latents: Tensor, pixels: Tensor) -> Scored: ...


OpenSource = Callable[[SynthConfig, Plan, str, int], ImageSource]
"""(settings, plan, device, compute threads) -> the networks, opened in the process that is to run them."""

MOST_BATCHES = 4
"""Batches at a time on a CPU. Each needs the memory of its own activations."""


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
        if self.device.type == "cuda":
            self._pipeline.warm_up(self.batch)

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
        similarity, quality, features = self._pipeline.score(pixels, self._photos[self._classes(items)])
        flat = pixels.flatten(1, 2)
        return Scored(
            pixels,
            similarity,
            quality,
            latents.flatten(1).isfinite().all(dim=1),
            (flat.amax(dim=1) == flat.amin(dim=1)).all(dim=1),
            features,
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


def open_engine(config: SynthConfig, plan: Plan, device: str, threads: int) -> Generator:
    """The networks of `config.engine`.

    With ONNX Runtime on the CPU several batches are made at the same time, each by few threads: cores that work on
    batches of their own do not wait for each other after every operator (bench/results/synth.md). AOTInductor's
    packages keep Python's lock while they run.
    """
    unet = read_manifest(config.engine, "export")["engine"]["networks"]["unet"]
    several = device == "cpu" and unet["compiler"] == "onnxruntime"
    concurrency = min(threads, MOST_BATCHES) if several else 1
    torch.set_num_threads(max(1, threads // concurrency))  # for what torch does between the networks
    engines = runtime.load(config.engine, device=device, threads=threads // concurrency)
    return Generator(engines, plan.classes, config, plan.prompts, concurrency)


def engine_device(manifest: Mapping[str, Any]) -> str:
    """The device that an engine was made for; "cpu" where its manifest does not say, as for stand-ins in tests."""
    return str(manifest.get("config", {}).get("spec", {}).get("device", "cpu"))


def check_fits(config: SynthConfig, manifest: Mapping[str, Any], device: str | None) -> None:
    """UserError when the engine of `config` cannot do what is asked of it on `device`; None: no device of this machine.

    Nothing has been written yet, so a mistake costs nothing that is there already.
    """
    try:
        networks = manifest["engine"]["networks"]
        for name in NETWORKS:
            if name not in networks:
                raise UserError(f"{config.engine} has no network {name!r}; export it again")
        images_at_a_time(config, Signature.from_dict(networks["unet"]["signature"]).batch)
        if device is not None:
            engine = manifest["engine"]
            if not config.overwrite:
                # workers look at every byte of the files when they open them; before something is deleted, we do too
                engine = {**engine, "networks": {}, "extras": {}}
            check_engine(config.engine, engine, manifest["config"]["spec"], device)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{config.engine}: its manifest is not that of an engine ({error}); export it again"
        ) from error
