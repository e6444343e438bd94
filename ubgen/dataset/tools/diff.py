"""What differs between two datasets, down to the pixels."""

import io
import itertools
import json
import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ubgen.core.errors import UserError
from ubgen.core.files import Store
from ubgen.core.stage import read_run
from ubgen.dataset.reader import ShardDataset, open_dataset, reading
from ubgen.dataset.shards import Place, SampleRecord, ShardInfo

_LISTED = 20
_BATCH = 64

Progress = Callable[[int, int], None]


@dataclass
class Difference:
    """Of datasets A and B, over the samples that both have.

    `same_bytes`: every tar has the same checksum. `plan`: names of what differs in run.json. `only_a`, `only_b`:
    number of samples that are missing in the other. `labels`, `prompts`, `flags`: samples where these differ.
    `scores`: largest difference of each score. `images`: images whose stored bytes differ; `sizes` of them differ in
    width or height.

    Pixels are compared in the shards that differ: `within` of `pixels` differ by at most `levels` grey levels in every
    channel. `lowest_share` is that share in the worst image, `largest` the largest difference of a channel, `squares`
    the sum of the squared differences.
    """

    levels: int
    samples: int = 0
    same_bytes: bool = False
    plan: list[str] = field(default_factory=list)
    only_a: int = 0
    only_b: int = 0
    labels: int = 0
    prompts: int = 0
    flags: int = 0
    scores: dict[str, float] = field(default_factory=dict)
    images: int = 0
    sizes: int = 0
    pixels: int = 0
    within: int = 0
    lowest_share: float = 1.0
    largest: int = 0
    squares: float = 0.0
    examples: list[str] = field(default_factory=list)
    """Up to 20 keys with what differs."""

    @property
    def share(self) -> float:
        """Of the pixels compared, those within `levels`; 1 where no pixel had to be compared."""
        return self.within / self.pixels if self.pixels else 1.0

    @property
    def psnr(self) -> float:
        """Peak signal-to-noise ratio in dB over the images compared; infinite where they are equal."""
        return 10 * math.log10(255**2 * 3 * self.pixels / self.squares) if self.squares else math.inf

    @property
    def same_samples(self) -> bool:
        """The same samples with the same labels, prompts and sizes, whatever their pixels and scores."""
        return not (self.only_a or self.only_b or self.labels or self.prompts or self.sizes)

    def agrees(self, share: float | None = None) -> bool:
        """Same bytes; or, with `share`, the same samples with at least that share of pixels within `levels`."""
        check_tolerance(self.levels, share)
        return self.same_bytes or (share is not None and self.same_samples and self.share >= share)

    def to_dict(self) -> dict[str, Any]:
        """For JSON, which has no infinity: "psnr" is null for equal images, a score that only one side has too."""
        names = [name for name in self.__dataclass_fields__ if name != "squares"]
        about = {name: getattr(self, name) for name in names}
        scores = {name: gap if math.isfinite(gap) else None for name, gap in self.scores.items()}
        return {**about, "scores": scores, "share": self.share, "psnr": self.psnr if self.squares else None}


def check_tolerance(levels: int, share: float | None = None) -> None:
    """UserError for a tolerance that would let everything pass, or nothing."""
    if not 0 <= levels <= 255:
        raise UserError(f"--tolerance-levels must lie in 0..255, not {levels}")
    if share is not None and not 0 <= share <= 1:  # also refuses NaN
        raise UserError(f"--share must lie in 0..1, such as 0.999, not {share}")


class _Stored(NamedTuple):
    """A sample of one dataset, and the shard where it lies."""

    shard: ShardInfo
    record: SampleRecord

    @property
    def key(self) -> str:
        return self.record.key

    def read(self, place: Place) -> bytes:
        offset, size = place
        return self.shard.store.read_range(self.shard.tar, offset, offset + size)

    @property
    def where(self) -> str:
        return f"{self.shard.store.address(self.shard.tar)}: sample {self.key[:40]}"

    def prompt(self) -> Any:
        meta = self.read(self.record.json)
        with reading(self.where):
            if isinstance(entry := json.loads(meta), dict):
                return entry.get("prompt")
            raise ValueError("its .json is not an object")

    def decoded(self, image: bytes) -> np.ndarray:
        with reading(self.where):
            return np.asarray(Image.open(io.BytesIO(image)).convert("RGB"), np.int16)


class _Pixels(NamedTuple):
    prompts_differ: bool
    bytes_differ: bool = False
    sizes_differ: bool = False
    pixels: int = 0
    within: int = 0
    largest: int = 0
    squares: float = 0.0


def diff(
    a: str | Path | Store,
    b: str | Path | Store,
    *,
    levels: int = 1,
    workers: int | None = None,
    progress: Progress = lambda done, total: None,
) -> Difference:
    """Compare two datasets, finished or not, sample by sample where their shards' checksums differ.

    `levels` is the difference of grey levels (0 to 255) that still counts as near. `progress` is called with samples
    done and their total. UserError where there is no dataset.
    """
    check_tolerance(levels)
    first, second = open_dataset(a, partial=True), open_dataset(b, partial=True)
    result = Difference(levels, plan=_plan_differences(first.store, second.store))
    sums = [{shard.index: shard.sha256 for shard in dataset.shards} for dataset in (first, second)]
    result.same_bytes = sums[0] == sums[1]
    same = {index for index in sums[0] if sums[0][index] == sums[1].get(index)}
    result.samples = sum(shard.count for shard in first.shards if shard.index in same)
    total = max(len(first), len(second))
    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        pairs = _pairs(_stored(first, same), _stored(second, same), result)
        while batch := list(itertools.islice(pairs, _BATCH)):
            compared = pool.map(lambda pair: _compare(pair[0], pair[1], levels), batch)
            for (left, right), pixels in zip(batch, compared, strict=True):
                _add(result, left, right, pixels)
            progress(result.samples, total)
    return result


def _plan_differences(a: Store, b: Store) -> list[str]:
    plans = [_plan(store) for store in (a, b)]
    return sorted(
        name for name in plans[0].keys() | plans[1].keys() if plans[0].get(name) != plans[1].get(name)
    )


def _plan(store: Store) -> dict[str, Any]:
    """What identifies the run of ubgen-synth; nothing for a conversion."""
    try:
        return read_run(store, "synth")
    except UserError:
        return {}


def _stored(dataset: ShardDataset, without: set[int]) -> Iterator[_Stored]:
    for shard in dataset.shards:
        if shard.index not in without:
            yield from (_Stored(shard, record) for record in shard.read().samples)


def _pairs(
    a: Iterator[_Stored], b: Iterator[_Stored], result: Difference
) -> Iterator[tuple[_Stored, _Stored]]:
    """Samples of one key; keys increase in both. Those without a partner are counted."""
    left, right = next(a, None), next(b, None)
    while left or right:
        if left and right and left.key == right.key:
            yield left, right
            left, right = next(a, None), next(b, None)
        elif right is None or (left and left.key < right.key):
            result.only_a += 1
            _note(result, left.key if left else "", "only in A")
            left = next(a, None)
        else:
            result.only_b += 1
            _note(result, right.key, "only in B")
            right = next(b, None)


def _compare(left: _Stored, right: _Stored, levels: int) -> _Pixels:
    prompts_differ = left.prompt() != right.prompt()
    data = [side.read(side.record.image) for side in (left, right)]
    if data[0] == data[1]:
        with reading(left.where), Image.open(io.BytesIO(data[0])) as image:
            pixels = image.width * image.height
        return _Pixels(prompts_differ, pixels=pixels, within=pixels)
    images = [side.decoded(encoded) for side, encoded in zip((left, right), data, strict=True)]
    if images[0].shape != images[1].shape:
        return _Pixels(prompts_differ, True, sizes_differ=True)
    difference = np.abs(images[0] - images[1])
    near = int((difference.max(axis=2) <= levels).sum())
    squares = float(np.square(difference.astype(np.float64)).sum())
    size = difference.shape[0] * difference.shape[1]
    return _Pixels(prompts_differ, True, False, size, near, int(difference.max()), squares)


def _add(result: Difference, left: _Stored, right: _Stored, pixels: _Pixels) -> None:
    a, b = left.record, right.record
    found = []
    result.samples += 1
    if a.class_index != b.class_index:
        result.labels += 1
        found.append(f"class {a.class_index} and {b.class_index}")
    if pixels.prompts_differ:
        result.prompts += 1
        found.append("prompt")
    if a.flag != b.flag:
        result.flags += 1
        found.append("flag")
    for name in sorted(a.scores.keys() | b.scores.keys()):
        gap = _gap(a.scores.get(name), b.scores.get(name))
        result.scores[name] = max(result.scores.get(name, 0.0), gap)
    if pixels.bytes_differ:
        result.images += 1
        result.sizes += pixels.sizes_differ
        found.append("size" if pixels.sizes_differ else f"image, by up to {pixels.largest}")
    result.pixels += pixels.pixels
    result.within += pixels.within
    result.squares += pixels.squares
    result.largest = max(result.largest, pixels.largest)
    if pixels.pixels:
        result.lowest_share = min(result.lowest_share, pixels.within / pixels.pixels)
    if found:
        _note(result, left.key, ", ".join(found))


def _gap(a: float | None, b: float | None) -> float:
    """Infinite where only one has a score."""
    if a is None or b is None:
        return 0.0 if a is b else math.inf
    return abs(a - b)


def _note(result: Difference, key: str, text: str) -> None:
    if len(result.examples) < _LISTED:
        result.examples.append(f"{key}: {text}")
