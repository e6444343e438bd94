"""One worker: an engine on one device, and the stages from noise to shards, all busy at the same time."""

import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ubgen.core.errors import UserError
from ubgen.dataset import Store
from ubgen.synth.accounts import Account, shares_of
from ubgen.synth.assembly import Assembly, Encoded
from ubgen.synth.config import SynthConfig
from ubgen.synth.encode import encoder
from ubgen.synth.feed import Feed
from ubgen.synth.generator import Scored
from ubgen.synth.pipeline import Pipeline, Stage, Stopped
from ubgen.synth.plan import Item, Plan, exhausted_file
from ubgen.synth.selection import Chosen, Exhausted, Made, Selection

TICK = 0.1
"""Seconds between two looks at which stage the others wait for."""


class Chain(Protocol):
    """What a worker needs of `Generator`. It is called by `concurrency` threads at a time."""

    batch: int
    concurrency: int

    @property
    def device(self) -> torch.device: ...
    def denoise(self, items: Sequence[Item]) -> Tensor: ...
    def decode(self, latents: Tensor) -> Tensor: ...
    def score(self, items: Sequence[Item], latents: Tensor, pixels: Tensor) -> Scored: ...


@dataclass(frozen=True)
class Links:
    """How a worker talks to whoever runs it. `take` may block; `progress` gets the number of images just decided, and
    the share of the time so far for which each stage was the bottleneck."""

    take: Callable[[], int | None]
    finished: Callable[[int], None]
    progress: Callable[[int, dict[str, float]], None] = lambda images, shares: None


@dataclass
class _Batch:
    """Travels down the stages. `ready` is what a stage on another CUDA stream has to wait for."""

    items: list[Item]
    latents: Tensor | None = None
    pixels: Tensor | None = None
    scored: Scored | None = None
    ready: Any = None


def work(chain: Chain, plan: Plan, config: SynthConfig, store: Store, links: Links) -> Account:
    """Make the shards that `links.take` gives, until it gives None.

    An error of any stage ends the worker; shards that it has finished stay.
    """
    feed = Feed(plan, links.take)
    start = time.perf_counter()
    with Assembly(store, plan, config.seed, links.finished) as assembly:
        stages = _Stages(chain, config, feed, assembly, store, links)
        with Pipeline(stages.build()) as pipeline, _ticking(pipeline):
            stages.pipeline = pipeline
            try:
                while items := feed.next(chain.batch, pipeline.check):
                    pipeline.put(_Batch(items))
            except Stopped:
                pass  # the end of the block raises what stopped it
    seconds = time.perf_counter() - start
    return Account(stages.images, seconds, *_times(pipeline, seconds))


class _Stages:
    """On a GPU each network has a stage and a CUDA stream of its own. On a CPU a batch passes all networks in one
    thread, as they would only take the cores from each other, and `Chain.concurrency` batches do so at the same time;
    encoding and writing have threads of their own."""

    pipeline: Pipeline

    def __init__(
        self, chain: Chain, config: SynthConfig, feed: Feed, assembly: Assembly, store: Store, links: Links
    ) -> None:
        self.images = 0
        self._chain = chain
        self._feed = feed
        self._assembly = assembly
        self._store = store
        self._links = links
        self._selection = Selection(config)
        self._encoder = encoder(config)

    def build(self) -> list[Stage]:
        networks = [("denoise", self._denoise), ("decode", self._decode), ("score", self._score)]
        rest = [
            Stage("select", self._select),
            Stage("encode", self._encode, torch.inference_mode),
            Stage("write", self._assembly.add),
        ]
        if self._chain.device.type == "cuda":
            return [Stage(name, self._on_stream(run), self._scope) for name, run in networks] + rest
        together = self._one_after_the_other(networks)
        return [Stage("networks", together, torch.inference_mode, self._chain.concurrency), *rest]

    def _one_after_the_other(
        self, networks: Sequence[tuple[str, Callable[[_Batch], None]]]
    ) -> Callable[[_Batch], _Batch]:
        def run(batch: _Batch) -> _Batch:
            for name, network in networks:
                start = time.perf_counter()
                network(batch)
                self.pipeline.charge(name, time.perf_counter() - start)
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
        with torch.inference_mode(), torch.cuda.stream(torch.cuda.Stream(self._chain.device)):
            yield

    def _denoise(self, batch: _Batch) -> None:
        batch.latents = self._chain.denoise(batch.items)

    def _decode(self, batch: _Batch) -> None:
        assert batch.latents is not None
        batch.pixels = self._chain.decode(batch.latents)

    def _score(self, batch: _Batch) -> None:
        assert batch.latents is not None
        assert batch.pixels is not None
        scored = self._chain.score(batch.items, batch.latents, batch.pixels)
        batch.scored = scored if self._encoder.on_device else _to_host(scored)

    def _select(self, batch: _Batch) -> list[Chosen]:
        assert batch.scored is not None
        chosen, again = self._judge(zip(batch.items, batch.scored.rows(len(batch.items)), strict=True))
        self._feed.decided(len(batch.items), again)
        self.images += len(chosen)
        self._links.progress(len(chosen), shares_of(_times(self.pipeline, 1.0)[1]))
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
            name, store = exhausted_file(error.item), self._store
            store.write(name, "".join(json.dumps(line, sort_keys=True) + "\n" for line in error.rejected))
            raise UserError(f"{error} ({store.address(name)} lists its draws)") from None


def _to_host(scored: Scored) -> Scored:
    """Pixels in pinned memory, which torch's allocator uses again for a later batch; nothing waits for the copy yet."""
    if scored.pixels.device.type != "cuda":
        return scored
    pinned = torch.empty(scored.pixels.shape, dtype=torch.uint8, pin_memory=True)
    pinned.copy_(scored.pixels, non_blocking=True)
    return Scored(pinned, scored.similarity, scored.quality, scored.finite, scored.constant)


@contextmanager
def _ticking(pipeline: Pipeline) -> Iterator[None]:
    over = threading.Event()

    def tick() -> None:
        pipeline.tick()  # however short the run is
        while not over.wait(TICK):
            pipeline.tick()

    thread = threading.Thread(target=tick, name="ubgen-tick", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _times(pipeline: Pipeline, seconds: float) -> tuple[dict[str, float], dict[str, float]]:
    """(busy, bottleneck) in seconds. Where the networks share a stage, its part is split by their own times."""
    busy, ticks = dict(pipeline.busy), pipeline.bottlenecks()
    total = sum(ticks.values())
    bottleneck = {name: seconds * count / total for name, count in ticks.items()} if total else {}
    together = busy.pop("networks", None)
    if together is not None:
        share = bottleneck.pop("networks", 0.0)
        parts: dict[str, float] = {n: busy[n] for n in ("denoise", "decode", "score") if n in busy}
        bottleneck = {name: share * part for name, part in shares_of(parts).items()} | bottleneck
        busy = parts | {name: value for name, value in busy.items() if name not in parts}
    return busy, bottleneck
