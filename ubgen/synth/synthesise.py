"""The stage: shards that are missing are made, one after the other; then the directory is finished."""

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ubgen import runtime
from ubgen.classes import ClassList, load_classes
from ubgen.config import to_dict
from ubgen.dataset import ShardWriter, open_dataset, write_card, write_classes
from ubgen.manifest import MANIFEST, stage_directory
from ubgen.synth.config import SynthConfig
from ubgen.synth.generator import Generator, Made
from ubgen.synth.plan import Item, Plan, identity, start_or_resume
from ubgen.synth.sheet import SHEET, write_sheet
from ubgen.synth.stats import dataset_stats

Progress = Callable[[int, int], None]
"""Called with the images that are finished and their total, first with what an earlier run left."""


@dataclass(frozen=True)
class Synthesised:
    """`made` of the `images` were made by this run, at `images_per_second`; see `dataset_stats` for `stats`."""

    path: Path
    images: int
    made: int
    images_per_second: float
    stats: dict[str, Any]
    sheet: Path


def synthesise(config: SynthConfig, progress: Progress = lambda done, total: None) -> Synthesised:
    """Make the dataset that `config` describes, or the part of it that is missing.

    UserError for a wrong input, an output directory in use, finished, or holding another run.
    """
    config.check()
    classes = load_classes(config.classes)
    engines = runtime.load(config.engine, device=config.device)
    plan = Plan(classes, config.per_class, config.shard_size)
    with stage_directory(config.out, "synth", to_dict(config), overwrite=config.overwrite) as stage:
        start_or_resume(stage.path, identity(config, classes, engines.key), config.overwrite)
        write_classes(stage.path, classes.ids, classes.names, classes.names)
        started = time.monotonic()
        made = _make_missing(config, engines, plan, progress)
        speed = made / max(time.monotonic() - started, 1e-9)
        dataset = open_dataset(stage.path, partial=True)
        stats = dataset_stats(dataset)
        write_sheet(dataset, plan, stage.path / SHEET)
        write_card(
            stage.path, _title(config), _facts(config, plan, engines.key, stats), plan.images, len(classes)
        )
        stage.finish(
            _inputs(config),
            engine_key=engines.key,
            dataset={"images": plan.images, "shards": plan.shards, "classes": len(classes)},
            stats=stats,
            speed={"images": made, "images_per_second": speed},
        )
    return Synthesised(config.out, plan.images, made, speed, stats, config.out / SHEET)


def _inputs(config: SynthConfig) -> dict[str, Path]:
    """The engine's manifest holds the hashes of its files; a shipped class list has no file of its own."""
    inputs = {"engine": config.engine / MANIFEST}
    file = Path(config.classes).expanduser()
    return {**inputs, "classes": file} if file.is_file() else inputs


def _make_missing(config: SynthConfig, engines: runtime.EngineSet, plan: Plan, progress: Progress) -> int:
    """Number of images made."""
    todo = plan.unfinished(config.out)
    total = sum(plan.shard_length(shard) for shard in todo)
    progress(plan.images - total, plan.images)
    if not todo:
        return 0
    generator = Generator(engines, plan.classes, config)
    made = 0
    for shard in todo:
        for count in _make_shard(shard, config, plan, generator):
            made += count
            progress(plan.images - total + made, plan.images)
    return total


def _make_shard(shard: int, config: SynthConfig, plan: Plan, generator: Generator) -> Iterator[int]:
    """Yields the number of images after each batch. Batches never span shards: a shard made again is the same."""
    items = plan.shard_items(shard)
    with ShardWriter(config.out, shard, config.format) as writer:
        while batch := list(itertools.islice(items, generator.batch)):
            for item, made in zip(batch, generator.make(batch), strict=True):
                _write(writer, item, made, config, plan.classes)
            yield len(batch)


def _write(writer: ShardWriter, item: Item, made: Made, config: SynthConfig, classes: ClassList) -> None:
    name = classes.names[item.class_index]
    meta = {
        "class_id": classes.ids[item.class_index],
        "class_name": name,
        "prompt": name,
        "identity": {
            "seed": config.seed,
            "class_index": item.class_index,
            "image_index": item.image_index,
        },
    }
    scores = {"clip_similarity": made.clip_similarity, "quality": made.quality}
    writer.write(item.position, Image.fromarray(made.pixels), item.class_index, meta, scores)


def _title(config: SynthConfig) -> str:
    return f"{Path(config.classes).stem}, synthetic ({config.per_class} per class)"


def _facts(config: SynthConfig, plan: Plan, engine_key: str, stats: dict[str, Any]) -> dict[str, str]:
    return {
        "images per class": str(config.per_class),
        "shards": str(plan.shards),
        "sampler": f"PNDM, {config.steps} steps, guidance {config.guidance}",
        "prompt": "the class name",
        "seed": str(config.seed),
        "engine": engine_key,
        'mean CLIP similarity to "photo of {class}"': f"{stats['clip_similarity']['mean']:.4f}",
        "mean Q-Align score (1 bad to 5 excellent)": f"{stats['quality']['mean']:.4f}",
    }
