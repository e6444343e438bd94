"""The stage: shards that are missing are made; then the directory is described and finished."""

import json
import random
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ubgen.core.classes import load_classes
from ubgen.core.config import to_dict
from ubgen.core.console import Report
from ubgen.core.locks import InUse
from ubgen.core.stage import MANIFEST, Stage, read_manifest
from ubgen.dataset import Store, open_dataset, open_store, shard_files, write_classes
from ubgen.dataset.card import CardFacts, write_card
from ubgen.dataset.croissant import write_croissant
from ubgen.dataset.tools.measured import measured_by_kept_features
from ubgen.dataset.tools.pictures import write_pictures
from ubgen.dataset.tools.stats import dataset_stats
from ubgen.synth.config import SynthConfig
from ubgen.synth.generator import OpenSource, check_fits, engine_device, open_engine
from ubgen.synth.local import Job, devices, run_local
from ubgen.synth.plan import Plan, identity
from ubgen.synth.prompts import check_prompts, class_prompts
from ubgen.synth.ray_cluster import cluster, run_ray
from ubgen.synth.speed import SPEED_FILES, History, Speed, leave, shares, speed_files, total
from ubgen.synth.worker import EXHAUSTED_FILES

LEDGER = "rejections.jsonl"
_OWNS = (
    *("shard-[0-9]*.tar", "shard-[0-9]*.idx", "shard-[0-9]*.npy", "shard-[0-9]*.json"),
    *(SPEED_FILES, EXHAUSTED_FILES, LEDGER),
    *("classes.json", "README.md", "croissant.json", "samples.csv", "*.png"),
)


@dataclass(frozen=True)
class Synthesised:
    """`made` of the `images` were made by this call, at `images_per_second`; see `dataset_stats` for `stats`.

    Not `complete` when other parts of a static run have shards to make yet: then there are no `stats`. `found`: the
    directory held the finished dataset already, and the speed is the one in its manifest.
    """

    path: str
    images: int
    made: int
    images_per_second: float
    bottlenecks: dict[str, float]
    complete: bool
    stats: dict[str, Any] = field(default_factory=dict)
    found: bool = False

    def waits(self, most: int) -> str:
        """What the run waited for, as text."""
        return _shares_text(self.bottlenecks, most)


def synthesise(
    config: SynthConfig,
    progress: Report = lambda done, total, note="": None,
    say: Callable[[str], None] = lambda line: None,
    open_source: OpenSource = open_engine,
) -> Synthesised:
    """Make the dataset that `config` describes, or the part of it that is missing.

    `progress` is called first with what an earlier call left; `say` gets a line now and then. `open_source` opens the
    networks in each worker; a benchmark gives others than the engine's. UserError for a wrong input, and for an output
    directory that is in use or holds another run.
    """
    run = _Run.of(config, open_source)
    shared = run.config.executor == "static"
    if run.stage(shared).look() == "finished":
        return run.found()
    run.check()
    with (
        cluster(run.config) if run.config.executor == "ray" else nullcontext(),
        run.stage(shared).hold() as stage,
    ):
        if stage.state == "finished":
            return run.found()
        stage.begin()
        write_classes(stage.store, run.plan.classes.ids, run.plan.classes.names, run.plan.prompts)
        speed = run.make_missing(progress, say)
        if not shared:
            return run.finish(stage, speed)
    return _finish_shared(run, speed)


def _finish_shared(run: "_Run", speed: Speed) -> Synthesised:
    """The part that ends last finishes the dataset. Of several that end together one does, and the others wait for it,
    however long that takes: when it dies its lock ends, and another takes over."""
    while not run.plan.unfinished(run.store):
        try:
            with run.stage(shared=False).hold() as stage:
                if stage.state != "finished":
                    return run.finish(stage, speed)
                # another part was quicker; in object storage, where parts do not see each other, perhaps too quick to
                # add up this one
                _delete(run.store, speed_files(run.store.names()))
                return run.result(speed, read_manifest(run.store, "synth")["stats"])
        except InUse:
            time.sleep(random.uniform(0.1, 1.0))
    return run.result(speed)


@dataclass(frozen=True)
class _Run:
    """One dataset, as this call is to make it."""

    job: Job
    engine: dict[str, Any]
    """The engine's manifest."""
    store: Store

    @staticmethod
    def of(config: SynthConfig, open_source: OpenSource) -> "_Run":
        """UserError for what is wrong with the settings themselves."""
        engine = read_manifest(config.engine, "export")
        config = replace(config, device=config.device or engine_device(engine))
        config.check()
        classes = load_classes(config.classes)
        prompts = class_prompts(classes, config.prompt, config.prompts)
        plan = Plan(classes, prompts, config.per_class, config.shard_size, config.format)
        return _Run(Job(config, plan, open_source), engine, open_store(config.out))

    @property
    def config(self) -> SynthConfig:
        return self.job.config

    @property
    def plan(self) -> Plan:
        return self.job.plan

    def stage(self, shared: bool) -> Stage:
        return Stage(
            self.store,
            "synth",
            identity(self.config, self.plan, self.engine["engine"]["key"]),
            config=to_dict(self.config),
            owns=_OWNS,
            has_work=lambda store: bool(shard_files(store.names())),
            overwrite=self.config.overwrite and not shared,
            shared=shared,
        )

    def check(self) -> None:
        """All else that can be wrong is found here, before a file is touched."""
        # with Ray, compilers and devices are those of the nodes, which look at them
        here = devices(self.config) if self.config.executor != "ray" else [None]
        if self.job.open_source is open_engine:
            check_fits(self.config, self.engine, here[0])
            self.prompt_notes()

    def prompt_notes(self) -> list[str]:
        """What the card says of prompts that are equal or cut; UserError where equal ones are not allowed."""
        if self.job.open_source is not open_engine:  # a benchmark's, whose engine is none
            return []
        return check_prompts(self.config, self.plan.classes, self.plan.prompts, self.engine)

    def make_missing(self, progress: Report, say: Callable[[str], None]) -> Speed:
        """By this call; with `points`."""
        plan, todo = self.plan, self._own(self.plan.unfinished(self.store))
        images = sum(map(plan.shard_length, self._own(range(plan.shards))))
        there, note = images - sum(map(plan.shard_length, todo)), ""
        history = History(lambda made: progress(there + made, images, note))
        if not todo:
            return Speed()

        def decided(made: int, waits: dict[str, float]) -> None:
            nonlocal note
            note = f"waits for {_shares_text(waits, 2)}" if waits else ""
            history.add(made)

        execute = run_ray if self.config.executor == "ray" else run_local
        speed = execute(self.job, todo, decided, say)
        speed.points = history.points()
        leave(self.store, speed)
        return speed

    def _own(self, shards: Iterable[int]) -> list[int]:
        """Those of this part: every n-th of the whole run, so that parts are equal whatever is finished already."""
        if self.config.executor != "static":
            return list(shards)
        part, parts = self.config.static_part()
        return [shard for shard in shards if shard % parts == part]

    def finish(self, stage: Stage, speed: Speed) -> Synthesised:
        """Describe the dataset, and write the manifest."""
        plan, files = self.plan, speed_files(self.store.names())
        whole = total(self.store, files)
        stats = self._describe(whole["throughput"])
        stage.finish(
            _inputs(self.config),
            engine_key=self.engine["engine"]["key"],
            dataset={"images": plan.images, "shards": plan.shards, "classes": len(plan.classes)},
            features={"files": "shard-*.npy", "of": "CLIP", "clip_hash": self._clip_hash()},
            stats=stats,
            speed=whole,
            **self._origin(),
            same_bits=self.engine.get("same_bits"),
        )
        _delete(self.store, files)
        return self.result(speed, stats)

    def result(self, speed: Speed, stats: dict[str, Any] | None = None) -> Synthesised:
        return Synthesised(
            str(self.config.out),
            self.plan.images,
            speed.images,
            speed.images_per_second,
            shares(speed.bottleneck),
            stats is not None,
            stats or {},
        )

    def found(self) -> Synthesised:
        """Of the finished dataset in the output directory."""
        manifest = read_manifest(self.store, "synth")
        speed = manifest["speed"]
        return Synthesised(
            str(self.config.out),
            self.plan.images,
            0,
            speed["images_per_second"],
            speed["bottleneck_shares"],
            True,
            manifest["stats"],
            found=True,
        )

    def _describe(self, throughput: list[tuple[float, int]]) -> dict[str, Any]:
        """Write what lies beside the shards: ledger, pictures, cards; returns `dataset_stats`."""
        config, plan, store = self.config, self.plan, self.store
        dataset = open_dataset(store, partial=True)
        stats = dataset_stats(dataset)
        with store.new_file(LEDGER) as file:
            for shard in dataset.shards:
                for line in shard.rejected():
                    file.write(json.dumps(line, sort_keys=True).encode() + b"\n")
        # of images that could be made after all
        _delete(store, [name for name in store.names() if fnmatchcase(name, EXHAUSTED_FILES)])
        write_pictures(dataset, store, throughput, stats)
        measures = measured_by_kept_features(dataset)
        facts = CardFacts(
            title=f"{Path(config.classes).stem}, synthetic ({config.per_class} per class)",
            images=plan.images,
            classes=len(plan.classes),
            shards=plan.shards,
            extension=plan.format,
            per_class=config.per_class,
            sampler=f"PNDM, {config.steps} steps, guidance {config.guidance}",
            seed=config.seed,
            prompt=_prompt(config),
            engine_key=self.engine["engine"]["key"],
            licence=config.licence,
            stats=stats,
            measures=measures,
            notes=self.prompt_notes(),
            **self._origin(),
        )
        write_card(store, facts)
        write_croissant(store, facts)
        return stats

    def _clip_hash(self) -> str:
        """Of the CLIP directory that the engine was exported from."""
        return str(self.engine.get("inputs", {}).get("clip", {}).get("hash", ""))

    def _origin(self) -> dict[str, str]:
        """Base model, as --base-model or the engine's manifest names it, and LoRA."""
        inputs = self.engine.get("inputs", {})
        model, lora = inputs.get("stable_diffusion", {}), inputs.get("lora", {})
        return {
            "base_model": self.config.base_model or Path(model.get("path", "")).name,
            "lora_hash": lora.get("hash", ""),
        }


def _shares_text(shares: dict[str, float], most: int) -> str:
    """ "denoise 93 %, decode 5 %" """
    top = sorted(shares.items(), key=lambda item: -item[1])[:most]
    return ", ".join(f"{name} {share:.0%}".replace("%", " %") for name, share in top if share > 0)


def _prompt(config: SynthConfig) -> str:
    text = "the class name" if config.prompt == "{name}" else f'"{config.prompt}"'
    return f"{text}; some classes have their own, see classes.json" if config.prompts else text


def _inputs(config: SynthConfig) -> dict[str, Path]:
    """The engine's manifest holds the hashes of its files; a shipped class list has no file of its own."""
    inputs = {"engine": Path(config.engine) / MANIFEST}
    file = Path(config.classes).expanduser()
    if file.is_file():
        inputs["classes"] = file
    return inputs | ({"prompts": config.prompts} if config.prompts else {})


def _delete(store: Store, names: Iterable[str]) -> None:
    for name in names:
        store.delete(name)
