"""Batches of images and labels, whatever decodes and augments them."""

from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import islice
from os import sched_getaffinity
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ubgen.core.errors import UserError, is_out_of_memory
from ubgen.core.files import Store
from ubgen.core.probes import dali
from ubgen.loading.augment import TrainingTransform, sample_seed
from ubgen.loading.decode import BrokenSample, EvaluationTransform, broken
from ubgen.loading.imageset import ImageSet, open_image_set, rank_order
from ubgen.loading.settings import Augmentation, Loader

Batch = dict[str, Any]
_AHEAD = 3  # batches that are in work while one is used


def training_batches(
    dataset: str | Path | Store | ImageSet,
    *,
    batch_size: int,
    image_size: int,
    seed: int = 0,
    epoch: int = 0,
    rank: int = 0,
    ranks: int = 1,
    loader: Loader = "auto",
    augment: bool = True,
    augmentation: Augmentation | None = None,
    threads: int = 0,
    start: int = 0,
    on_broken: Callable[[BrokenSample], None] | None = None,
    device: str = "cpu",
) -> Generator[Batch, None, None]:
    """One rank's batches of an epoch: dicts of images (B3HW float32, normalised), labels (B int64) and keys (B texts).

    The order is `rank_order` of the whole dataset; the last batch may be smaller. With `augment`, each image's random
    numbers come from (seed, epoch, sample) alone, so threads, ranks and batches do not matter; without, images are
    resized and cropped in the middle. `start` skips so many batches. `threads` 0 means one for each processor. DALI
    works on `device`, and leaves the images there; the threads leave them on the host.

    A sample that cannot be decoded raises BrokenSample, a UserError that names it; with `on_broken` it is left out,
    its batch is smaller, and `on_broken` gets the error.
    """
    if batch_size < 1 or image_size < 1:
        raise UserError(f"batch_size and image_size must be positive, not {batch_size} and {image_size}")
    data = open_image_set(dataset)
    order = rank_order(len(data), seed, epoch, rank, ranks)[start * batch_size :]
    transform: Any = EvaluationTransform(image_size)
    if augment:
        transform = TrainingTransform(image_size, augmentation)
    seeds = partial(sample_seed, seed, epoch)
    threads = threads or processors()
    if torch.device(device).type == "cpu":
        device = "cpu"  # of several processes it may be "cpu:0"
    if resolve(loader, device) == "dali":
        from ubgen.loading.dali import batches_by_dali

        return batches_by_dali(data, order, transform, batch_size, seeds, threads, on_broken, device)
    return batches_by_threads(data, order, transform, batch_size, seeds, threads, on_broken)


def resolve(loader: Loader, device: str) -> str:
    """The loader that "auto" means: DALI for a GPU, where it is installed, and threads for a CPU."""
    if loader not in ("auto", "threads", "dali"):
        raise UserError(f"--loader must be auto, threads or dali, not {loader!r}")
    if loader != "auto":
        return loader
    return "dali" if device != "cpu" and dali().available else "threads"


def processors() -> int:
    """How many this process may use."""
    return len(sched_getaffinity(0))


def batches_by_threads(
    data: ImageSet,
    order: np.ndarray,
    transform: Callable[[bytes, int], np.ndarray],
    batch_size: int,
    seeds: Callable[[int], int],
    threads: int = 0,
    on_broken: Callable[[BrokenSample], None] | None = None,
) -> Generator[Batch, None, None]:
    """The samples `order` in batches; a few batches are in work ahead of the one that is used."""

    def load(index: int) -> np.ndarray | BrokenSample:
        try:
            return transform(data.read(index), seeds(index))
        except Exception as error:  # of PIL, simplejpeg and the file system, of many kinds
            if is_out_of_memory(error):
                raise
            return broken(data.describe(index), error)

    chunks = (order[i : i + batch_size].tolist() for i in range(0, len(order), batch_size))
    pool = ThreadPoolExecutor(threads or processors(), "ubgen-loader")
    waiting = deque[tuple[list[int], list[Future[Any]]]]()
    try:
        for chunk in islice(chunks, _AHEAD):
            waiting.append((chunk, [pool.submit(load, index) for index in chunk]))
        while waiting:
            chunk, futures = waiting.popleft()
            batch = _collate(data, chunk, [future.result() for future in futures], on_broken)
            for following in islice(chunks, 1):
                waiting.append((following, [pool.submit(load, index) for index in following]))
            yield batch
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _collate(
    data: ImageSet,
    indices: list[int],
    results: list[np.ndarray | BrokenSample],
    on_broken: Callable[[BrokenSample], None] | None,
) -> Batch:
    whole = []
    for index, result in zip(indices, results, strict=True):
        if not isinstance(result, BrokenSample):
            whole.append((index, result))
        elif on_broken is None:
            raise result
        else:
            on_broken(result)
    kept = [index for index, _ in whole]
    images = np.stack([pixels for _, pixels in whole]) if whole else np.empty((0, 3, 0, 0), np.float32)
    return {
        "images": torch.from_numpy(images),
        "labels": torch.from_numpy(data.labels[kept].astype(np.int64)),
        "keys": [data.keys[index] for index in kept],
    }
