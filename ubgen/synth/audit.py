"""Samples of a finished dataset rendered again from their identities, and compared with what is stored."""

import io
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ubgen.classes import ClassList
from ubgen.config import from_dict
from ubgen.dataset import ShardDataset, Store, encode_image, open_dataset, open_store
from ubgen.errors import UserError
from ubgen.manifest import read_manifest
from ubgen.runtime import load
from ubgen.synth.config import SynthConfig
from ubgen.synth.generator import Generator
from ubgen.synth.plan import PLAN, Item

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
    """Render `sample` random images of `dataset` again, by default with the engine that made it.

    UserError when the dataset is unfinished, the engine is gone, or an identity does not belong to its place.
    """
    store = open_store(dataset)
    manifest = read_manifest(dataset, "synth")
    given = {name: value for name, value in manifest["config"].items() if value is not None}
    config = from_dict(given, SynthConfig, f"{store}/manifest.json")
    config = replace(config, engine=Path(engine or config.engine), device=device or config.device)
    samples = open_dataset(store)
    chosen = sorted(random.Random(seed).sample(range(len(samples)), min(sample, len(samples))))
    engines = load(config.engine, device=config.device)
    classes, prompts = _classes(store, samples)
    generator = Generator(engines, classes, config, prompts)
    found, close, values = Audit(same_engine=engines.key == manifest["engine_key"]), 0, 0
    for start in range(0, len(chosen), generator.batch):
        rows = chosen[start : start + generator.batch]
        items = [_item(samples, row, config, len(classes)) for row in rows]
        with torch.inference_mode():
            made = generator.make(items)
        for row, result in zip(rows, made, strict=True):
            again = encode_image(result.pixels.cpu().numpy(), config.format)
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


def _classes(store: Store, samples: ShardDataset) -> tuple[ClassList, list[str]]:
    run = json.loads(store.read(PLAN))
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
