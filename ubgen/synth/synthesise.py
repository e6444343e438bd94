"""The stage: shards that are missing are made, by whatever executor; then the directory is finished."""

import random
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from ubgen.core.classes import load_classes
from ubgen.core.config import to_dict
from ubgen.core.errors import UserError
from ubgen.core.locks import InUse
from ubgen.core.stage import MANIFEST, StageDirectory, read_manifest, stage_directory
from ubgen.dataset import Store, open_store, write_classes
from ubgen.synth.accounts import Account, History, Record, account_files, leave, left, together
from ubgen.synth.checks import check_fits, own_device
from ubgen.synth.config import SynthConfig
from ubgen.synth.executors.job import Events, Job, MakeChain, devices, open_engine
from ubgen.synth.executors.local import run_local
from ubgen.synth.executors.ray_cluster import cluster, run_ray
from ubgen.synth.executors.static import part_of, run_static
from ubgen.synth.finish import describe, origin
from ubgen.synth.plan import Plan, class_prompts, identity, read_record, start_or_resume

_RUN = {"local": run_local, "static": run_static, "ray": run_ray}
_OPEN: dict[str, Callable[[SynthConfig], AbstractContextManager[object]]]
_OPEN = {"local": nullcontext, "static": nullcontext, "ray": cluster}
Directory = Callable[..., AbstractContextManager[StageDirectory]]


@dataclass(frozen=True)
class Watch:
    """What the user sees while a run goes on.

    `progress` gets the images that are there and how many there will be, first with what an earlier run left; `say`
    gets a line now and then; `bottlenecks` the share of the time for which each stage held up the others.
    """

    progress: Callable[[int, int], None] = lambda done, total: None
    say: Callable[[str], None] = lambda line: None
    bottlenecks: Callable[[dict[str, float]], None] = lambda shares: None


@dataclass(frozen=True)
class Synthesised:
    """`made` of the `images` were made by this run, at `images_per_second`; see `dataset_stats` for `stats`.

    Not `complete` when other parts of a static run have shards to make yet: then there are no `stats`.
    """

    path: str
    images: int
    made: int
    images_per_second: float
    bottlenecks: dict[str, float]
    complete: bool
    stats: dict[str, Any] = field(default_factory=dict)


def synthesise(
    config: SynthConfig, watch: Watch | None = None, chain: MakeChain = open_engine
) -> Synthesised:
    """Make the dataset that `config` describes, or the part of it that is missing.

    `chain` opens the networks in each worker; a benchmark gives others than the engine's. UserError for a wrong input,
    an output directory in use, finished, or holding another run.
    """
    job, key = _checked(config, chain)
    config, plan = job.config, job.plan
    static = config.executor == "static"
    directory = partial(stage_directory, config.out, "synth", to_dict(config), overwrite=config.overwrite)
    with _OPEN[config.executor](config), directory(shared=static) as stage:
        start_or_resume(stage.store, identity(config, plan, key), config.overwrite, alone=not static)
        write_classes(stage.store, plan.classes.ids, plan.classes.names, plan.prompts)
        session = _make_missing(job, stage.store, watch or Watch())
        if not static:
            return session.finish(stage, key)
    return _finish_static(session, directory, key)


def _checked(config: SynthConfig, chain: MakeChain) -> tuple[Job, str]:
    """What is to be made, and the engine's key. All that can be wrong is found here, before a file is touched."""
    engine = read_manifest(config.engine, "export")
    config = replace(config, device=config.device or own_device(engine))
    config.check()
    classes = load_classes(config.classes)
    prompts = class_prompts(classes, config.prompt, config.prompts)
    plan = Plan(classes, prompts, config.per_class, config.shard_size, config.format)
    read_record(open_store(config.out))
    if config.executor != "ray":
        devices(config)
    if chain is open_engine:
        check_fits(config, engine)
    return Job(config, plan, chain), engine["engine"]["key"]


@dataclass(frozen=True)
class _Session:
    """One invocation of the command: what it made, and when."""

    job: Job
    store: Store
    record: Record

    def finish(self, stage: StageDirectory, key: str) -> Synthesised:
        """Describe the dataset, and write the manifest."""
        config, plan, files = self.job.config, self.job.plan, left(self.store)
        whole = together(files.values())
        facts = describe(self.store, config, plan, key, whole.points)
        stage.finish(
            _inputs(config),
            engine_key=key,
            dataset={"images": plan.images, "shards": plan.shards, "classes": len(plan.classes)},
            stats=facts,
            speed=whole.speed(),
            **origin(config),
            same_bits=read_manifest(config.engine, "export").get("same_bits"),
        )
        for name in files:
            self.store.delete(name)
        return self.result(True, facts)

    def result(self, complete: bool, stats: dict[str, Any] | None = None) -> Synthesised:
        images, record = self.job.plan.images, self.record
        made, shares = record.account.images, record.account.shares()
        speed = record.images_per_second
        return Synthesised(str(self.job.config.out), images, made, speed, shares, complete, stats or {})


def _make_missing(job: Job, store: Store, watch: Watch) -> _Session:
    todo = mine = job.plan.unfinished(store)
    if job.config.executor == "static":
        mine = part_of(todo, *job.config.static_part())
    missing = sum(map(job.plan.shard_length, mine))
    total = (
        job.plan.images
        if mine is todo
        else sum(map(job.plan.shard_length, part_of(range(job.plan.shards), *job.config.static_part())))
    )
    history = History(lambda images: watch.progress(total - missing + images, total))
    if not mine:
        return _Session(job, store, history.end(Account()))

    def progress(images: int, shares: dict[str, float]) -> None:
        watch.bottlenecks(shares)
        history.add(images)

    events = Events(lambda shard: None, progress, watch.say)
    record = history.end(_RUN[job.config.executor](job, todo, events))
    leave(store, record)
    return _Session(job, store, record)


def _finish_static(session: _Session, directory: Directory, key: str) -> Synthesised:
    """The part that ends last finishes the dataset. Of several that end together one does, and the others wait for it,
    however long that takes: when it dies its lock ends, and another takes over."""
    while not session.job.plan.unfinished(session.store):
        names = session.store.names()
        if MANIFEST in names:  # another part was quicker
            # in object storage, where parts do not see each other, perhaps too quick to add up this one
            for name in account_files(names):
                session.store.delete(name)
            return session.result(True, read_manifest(session.store, "synth")["stats"])
        try:
            with directory() as stage:
                return session.finish(stage, key)
        except UserError as error:
            finished = session.store.size(MANIFEST) is not None  # since we looked
            if not finished and not isinstance(error, InUse):
                raise
            time.sleep(random.uniform(0.1, 1.0))
    return session.result(False)


def _inputs(config: SynthConfig) -> dict[str, Path]:
    """The engine's manifest holds the hashes of its files; a shipped class list has no file of its own."""
    inputs = {"engine": Path(config.engine) / MANIFEST}
    file = Path(config.classes).expanduser()
    if file.is_file():
        inputs["classes"] = file
    return inputs | ({"prompts": config.prompts} if config.prompts else {})
