"""Samples of a finished dataset rendered again from their identities, and compared with what is stored."""

import io
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ubgen.core.classes import ClassList
from ubgen.core.config import from_dict
from ubgen.core.errors import UserError
from ubgen.core.stage import MANIFEST, read_manifest, read_run
from ubgen.dataset import ShardDataset, Store, open_dataset, open_store
from ubgen.runtime import load
from ubgen.synth.config import SynthConfig, check_device
from ubgen.synth.encode import encoder
from ubgen.synth.generator import Generator, engine_device
from ubgen.synth.plan import Item

LEVELS, SHARE = 1, 0.999


@dataclass
class Audit:
    """What was found.

    `within` is the share of pixel values that differ by at most one grey level, `largest` the largest difference;
    `differing` are the keys of images of which less than 99.9 % of the values are that close.
    """

    samples: int = 0
    same_bytes: int = 0
    within: float = 1.0
    largest: int = 0
    same_engine: bool = True
    differing: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return not self.differing


def audit(
    dataset: str | Path,
    engine: Path | None = None,
    sample: int = 64,
    seed: int = 0,
    device: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Audit:
    """Render `sample` random images of `dataset` again, by default with the engine that made it, on its own device.

    They are encoded as the run encoded them. UserError when the dataset is unfinished, the engine is gone, an identity
    does not belong to its place, or nvjpeg encoded the images and `device` is no GPU: on a CPU it cannot be told what
    its files should be.
    """
    if sample < 1:
        raise UserError(f"--sample must be at least 1, not {sample}")
    check_device(device)
    store = open_store(dataset)
    manifest = read_manifest(dataset, "synth")
    config = _config(store, manifest)
    path = Path(engine or config.engine)
    device = device or engine_device(read_manifest(path, "export"))
    # with what "auto" stood for: on another device that may be the other encoder
    config = replace(config, engine=path, device=device, encoder=config.resolved_encoder())
    if config.encoder == "nvjpeg" and not device.startswith("cuda"):
        raise UserError(
            f"--device {device}: nvjpeg encoded the images of {dataset}; audit it with --device cuda"
        )
    samples = open_dataset(store)
    chosen = sorted(random.Random(seed).sample(range(len(samples)), min(sample, len(samples))))
    engines = load(path, device=device)
    classes, prompts = _classes(store, samples)
    generator, encode = Generator(engines, classes, config, prompts), encoder(config)
    found, close, values = Audit(same_engine=engines.key == manifest["engine_key"]), 0, 0
    for start in range(0, len(chosen), generator.batch):
        rows = chosen[start : start + generator.batch]
        items = [_item(samples, row, config, len(classes)) for row in rows]
        with torch.inference_mode():
            files = encode([made.pixels for made in generator.make(items)])
        for row, again in zip(rows, files, strict=True):
            stored, _ = samples.encoded(row)
            difference = np.abs(_pixels(stored) - _pixels(again))
            near = int((difference <= LEVELS).sum())
            close, values = close + near, values + difference.size
            found.samples += 1
            found.same_bytes += stored == again
            found.largest = max(found.largest, int(difference.max()))
            if near < SHARE * difference.size:
                found.differing.append(f"{row:09d}")
        progress(found.samples, len(chosen))
    found.within = close / max(1, values)
    return found


def _config(store: Store, manifest: Mapping[str, Any]) -> SynthConfig:
    """The settings of the run that made the dataset."""
    given = {name: value for name, value in manifest["config"].items() if value is not None}
    return from_dict(given, SynthConfig, store.address(MANIFEST))


def _classes(store: Store, samples: ShardDataset) -> tuple[ClassList, list[str]]:
    run = read_run(store, "synth")
    return ClassList(tuple(run["class ids"]), tuple(run["class names"])), list(run["prompts"])


def _item(samples: ShardDataset, row: int, config: SynthConfig, classes: int) -> Item:
    """From what the sample says of itself, which must agree with its place in the dataset."""
    meta = samples[row].meta
    identity = meta["identity"]
    item = Item(row, identity["class_index"], identity["image_index"], identity["attempt"])
    if (item.image_index, item.class_index) != divmod(row, classes) or identity["seed"] != config.seed:
        raise UserError(
            f"{samples.store}: sample {row:09d} has the identity of another; run ubgen-dataset verify"
        )
    return item


def _pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), np.int16)
