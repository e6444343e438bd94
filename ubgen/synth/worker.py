"""One worker: an engine on one device, and the steps from noise to shards, all busy at the same time."""

import json
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from ubgen.core.errors import UserError
from ubgen.dataset import ShardWriter, Store
from ubgen.synth.config import SynthConfig
from ubgen.synth.encode import encoder
from ubgen.synth.generator import ImageSource, Scored
from ubgen.synth.plan import Item, Plan, identity_of
from ubgen.synth.selection import Chosen, Exhausted, Made, Selection
from ubgen.synth.speed import Speed, shares
from ubgen.synth.threads import Step, Steps, Stopped

EXHAUSTED_FILES = "exhausted-*.jsonl"
Encoded = tuple[Chosen, bytes]
Take = Callable[[], int | None]
"""The number of a shard to begin with, or None when there is none left; may block."""
_POLL = 0.05


class Feed:
    """Full batches for as long as there is anything to fill them with; a batch mixes classes and shards freely.

    Those to be drawn again come first, then the next ones of the shards that `take` gives.
    """

    def __init__(self, plan: Plan, take: Take) -> None:
        self._new = self._items(plan, take)
        self._again: deque[Item] = deque()
        self._undecided = 0
        self._changed = threading.Condition()

    def next(self, size: int, check: Callable[[], None] = lambda: None) -> list[Item]:
        """The next batch: `size` items, fewer only when no others can come any more, none at the end.

        While images are undecided that might have to be drawn again, it waits, and calls `check` meanwhile.
        """
        batch = self._some(size)
        while len(batch) < size:
            with self._changed:
                if not self._again:
                    if not self._undecided:
                        break
                    self._changed.wait(_POLL)
            check()
            batch += self._some(size - len(batch))
        with self._changed:
            self._undecided += len(batch)
        return batch

    def decided(self, count: int, again: Sequence[Item]) -> None:
        """Of `count` images it is known what becomes of them: these are drawn again."""
        with self._changed:
            self._undecided -= count
            self._again.extend(again)
            self._changed.notify_all()

    def _some(self, size: int) -> list[Item]:
        with self._changed:
            batch = [self._again.popleft() for _ in range(min(size, len(self._again)))]
        while len(batch) < size and (item := next(self._new, None)):
            batch.append(item)
        return batch

    @staticmethod
    def _items(plan: Plan, take: Take) -> Iterator[Item]:
        while (shard := take()) is not None:
            yield from plan.shard_items(shard)


class Assembly:
    """Writes each image to its shard as soon as those before it are there; use it as a context manager.

    An image that is drawn again holds up the rest of its shard, which waits in memory, encoded. `finished` is called
    with the number of every shard that is on disk. Leaving the block with an error removes what is unfinished.
    """

    def __init__(self, store: Store, plan: Plan, seed: int, finished: Callable[[int], None]) -> None:
        self._store = store
        self._plan = plan
        self._seed = seed
        self._finished = finished
        self._open: dict[int, _OpenShard] = {}

    def __enter__(self) -> "Assembly":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for shard in self._open.values():  # none is left after a run without error
            shard.writer.__exit__(kind or RuntimeError, error or RuntimeError("unfinished"), trace)

    def add(self, images: list[Encoded]) -> None:
        """Images in any order, each one time."""
        for chosen, data in images:
            number = chosen.item.position // self._plan.shard_size
            if number not in self._open:
                self._open[number] = _OpenShard(self._store, self._plan, number)
            shard = self._open[number]
            shard.waiting[chosen.item.position] = chosen, data
            self._write(shard)
            if shard.next == shard.end:
                del self._open[number]
                shard.writer.__exit__(None, None, None)
                self._finished(number)

    def _write(self, shard: "_OpenShard") -> None:
        while (ready := shard.waiting.pop(shard.next, None)) is not None:
            chosen, data = ready
            for line in chosen.rejected:
                shard.writer.reject(line)
            scores = {"clip_similarity": chosen.made.clip_similarity, "quality": chosen.made.quality}
            label = chosen.item.class_index
            meta, features = self._meta(chosen), chosen.made.features
            shard.writer.write(shard.next, data, label, meta, scores, chosen.flag, features)
            shard.next += 1

    def _meta(self, chosen: Chosen) -> dict[str, Any]:
        item, plan = chosen.item, self._plan
        return {
            "class_id": plan.classes.ids[item.class_index],
            "class_name": plan.classes.names[item.class_index],
            "prompt": plan.prompts[item.class_index],
            "identity": identity_of(self._seed, item),
        }


class _OpenShard:
    def __init__(self, store: Store, plan: Plan, number: int) -> None:
        self.next = number * plan.shard_size
        self.end = self.next + plan.shard_length(number)
        self.waiting: dict[int, Encoded] = {}
        self.writer = ShardWriter(store, number, plan.format)
        self.writer.__enter__()


@dataclass
class _Batch:
    """Travels down the stages. `ready` is what a stage on another CUDA stream has to wait for."""

    items: list[Item]
    latents: Tensor | None = None
    pixels: Tensor | None = None
    scored: Scored | None = None
    ready: Any = None


def work(
    source: ImageSource,
    plan: Plan,
    config: SynthConfig,
    store: Store,
    *,
    take: Take,
    finished: Callable[[int], None],
    decided: Callable[[int, dict[str, float]], None] = lambda images, shares: None,
) -> Speed:
    """Make the shards that `take` gives, until it gives None.

    `finished` gets the number of each shard that is on disk; `decided` the number of images just decided, and the share
    of the time so far for which each stage was the bottleneck. An error of any step ends the worker; shards that it has
    finished stay.
    """
    feed = Feed(plan, take)
    start = time.perf_counter()
    with Assembly(store, plan, config.seed, finished) as assembly:
        stages = _Stages(source, config, feed, assembly, store, decided)
        with Steps(stages.build()) as steps:
            stages.steps = steps
            try:
                while items := feed.next(source.batch, steps.check):
                    steps.put(_Batch(items))
            except Stopped:
                pass  # the end of the block raises what stopped it
    seconds = time.perf_counter() - start
    return Speed(stages.images, seconds, *_times(steps, seconds))


class _Stages:
    """On a GPU each network has a stage and a CUDA stream of its own. On a CPU a batch passes all networks in one
    thread, as they would only take the cores from each other, and `concurrency` batches do so at the same time;
    encoding and writing have threads of their own."""

    steps: Steps

    def __init__(
        self,
        source: ImageSource,
        config: SynthConfig,
        feed: Feed,
        assembly: Assembly,
        store: Store,
        decided: Callable[[int, dict[str, float]], None],
    ) -> None:
        self.images = 0
        self._source = source
        self._feed = feed
        self._assembly = assembly
        self._store = store
        self._decided = decided
        self._selection = Selection(config)
        self._encoder = encoder(config)

    def build(self) -> list[Step]:
        networks = [("denoise", self._denoise), ("decode", self._decode), ("score", self._score)]
        rest = [
            Step("select", self._select),
            Step("encode", self._encode, torch.inference_mode),
            Step("write", self._assembly.add),
        ]
        if self._source.device.type == "cuda":
            return [Step(name, self._on_stream(run), self._scope) for name, run in networks] + rest
        together = self._one_after_the_other(networks)
        return [Step("networks", together, torch.inference_mode, self._source.concurrency), *rest]

    def _one_after_the_other(
        self, networks: Sequence[tuple[str, Callable[[_Batch], None]]]
    ) -> Callable[[_Batch], _Batch]:
        def run(batch: _Batch) -> _Batch:
            for name, network in networks:
                start = time.perf_counter()
                network(batch)
                self.steps.charge(name, time.perf_counter() - start)
            return batch

        return run

    def _on_stream(self, network: Callable[[_Batch], None]) -> Callable[[_Batch], _Batch]:
        def run(batch: _Batch) -> _Batch:
            stream = torch.cuda.current_stream()
            if batch.ready is not None:
                stream.wait_event(batch.ready)
                for tensor in (batch.latents, batch.pixels):
                    if tensor is not None:
                        tensor.record_stream(
                            stream
                        )  # its memory is not given away before this stream is done
            network(batch)
            batch.ready = stream.record_event()
            batch.ready.synchronize()  # else this stage would run ahead, and the account show nothing
            return batch

        return run

    @contextmanager
    def _scope(self) -> Iterator[None]:
        with torch.inference_mode(), torch.cuda.stream(torch.cuda.Stream(self._source.device)):
            yield

    def _denoise(self, batch: _Batch) -> None:
        batch.latents = self._source.denoise(batch.items)

    def _decode(self, batch: _Batch) -> None:
        assert batch.latents is not None
        batch.pixels = self._source.decode(batch.latents)

    def _score(self, batch: _Batch) -> None:
        assert batch.latents is not None
        assert batch.pixels is not None
        scored = self._source.score(batch.items, batch.latents, batch.pixels)
        batch.scored = scored if self._encoder.on_device else _to_host(scored)

    def _select(self, batch: _Batch) -> list[Chosen]:
        assert batch.scored is not None
        chosen, again = self._judge(zip(batch.items, batch.scored.rows(len(batch.items)), strict=True))
        self._feed.decided(len(batch.items), again)
        self.images += len(chosen)
        self._decided(len(chosen), shares(_times(self.steps, 1.0)[1]))
        return chosen

    def _encode(self, chosen: list[Chosen]) -> list[Encoded]:
        files = self._encoder([image.made.pixels for image in chosen])
        return list(zip(chosen, files, strict=True))

    def _judge(self, made: Iterable[tuple[Item, Made]]) -> tuple[list[Chosen], list[Item]]:
        """An image that ends the run leaves its draws in a file of its own: its shard, which would hold them, is not
        finished. All other draws come again when the run is continued."""
        try:
            return self._selection.judge(made)
        except Exhausted as error:
            # parts of a run may end at the same time
            name, store = f"exhausted-{error.item.position:09d}.jsonl", self._store
            store.write(name, "".join(json.dumps(line, sort_keys=True) + "\n" for line in error.rejected))
            raise UserError(f"{error} ({store.address(name)} lists its draws)") from None


def _to_host(scored: Scored) -> Scored:
    """Pixels in pinned memory, which torch's allocator uses again for a later batch; nothing waits for the copy yet."""
    if scored.pixels.device.type != "cuda":
        return scored
    pinned = torch.empty(scored.pixels.shape, dtype=torch.uint8, pin_memory=True)
    pinned.copy_(scored.pixels, non_blocking=True)
    return replace(scored, pixels=pinned)


def _times(steps: Steps, seconds: float) -> tuple[dict[str, float], dict[str, float]]:
    """(busy, bottleneck) in seconds. Where the networks share a stage, its part is split by their own times."""
    busy, ticks = dict(steps.busy), steps.bottlenecks
    total = sum(ticks.values())
    bottleneck = {name: seconds * count / total for name, count in ticks.items()} if total else {}
    together = busy.pop("networks", None)
    if together is not None:
        share = bottleneck.pop("networks", 0.0)
        parts: dict[str, float] = {n: busy[n] for n in ("denoise", "decode", "score") if n in busy}
        bottleneck = {name: share * part for name, part in shares(parts).items()} | bottleneck
        busy = parts | {name: value for name, value in busy.items() if name not in parts}
    return busy, bottleneck
