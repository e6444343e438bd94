"""Features and logits of a backbone over a set of images, kept in a cache."""

import hashlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.numpy import load, save
from torch import Tensor

from ubgen.core.console import Report
from ubgen.core.errors import UserError, first_line, warn
from ubgen.core.files import atomic_write
from ubgen.evaluate.backbone import Backbone
from ubgen.loading.imageset import ImageSet
from ubgen.loading.loader import Batch, batches_by_threads, processors, resolve
from ubgen.loading.settings import Loader

Kind = Literal["features", "logits"]
Transform = Callable[[bytes, int], np.ndarray]
PART = 2048  # images of a file; a killed extraction loses less than that


def _silent(done: int, total: int, note: str = "") -> None:
    pass


def extract(
    backbone: Backbone,
    images: ImageSet,
    transform: Transform,
    *,
    kind: Kind = "features",
    cache: Path | None = None,
    batch_size: int = 128,
    threads: int = 0,
    loader: Loader = "auto",
    report: Report = _silent,
) -> np.ndarray:
    """(N, D) float32: one row for each image, in order; features, or the (N, K) logits.

    `transform` makes a normalised 3HW array of an encoded image; its `repr` must say all that it does, as that of
    `EvaluationTransform`. With `cache`, a directory, rows are kept there in parts, under a hash of the backbone's
    identity, the images and the transform: a call that was killed goes on, and two processes may share the directory.
    `batch_size` is rounded down to a power of two, so that parts hold whole batches and a continued call gives the
    same bits. `threads` 0 means one for each processor.

    UserError naming the image that cannot be decoded, or for which the network gives NaN or infinity.
    """
    if kind not in ("features", "logits"):
        raise UserError(f'kind must be "features" or "logits", not {kind!r}')
    if kind == "logits" and not backbone.outputs:
        backbone.logits(torch.empty(0))  # says so
    if batch_size < 1:
        raise UserError(f"batch_size must be positive, not {batch_size}")
    loader = "dali" if resolve(loader, str(backbone.device)) == "dali" else "threads"
    rows = np.empty((len(images), backbone.dim if kind == "features" else backbone.outputs), np.float32)
    directory = cache / _key(backbone, images, transform, kind, loader) if cache is not None else None
    missing = [part for part in _parts(len(rows)) if not (directory and _restored(directory, part, rows))]
    if missing:
        _compute(
            backbone, images, transform, kind, loader, batch_size, threads, missing, rows, directory, report
        )
    return rows


def _parts(count: int) -> list[slice]:
    return [slice(start, min(start + PART, count)) for start in range(0, count, PART)]


# --- the cache


def _key(backbone: Backbone, images: ImageSet, transform: Transform, kind: Kind, loader: str) -> str:
    """Labels do not count. Images stand for their content by place, name, size, and the time of their last change."""
    if (text := repr(transform)).endswith(">"):
        raise UserError(f"a transform with a cache needs a repr that says what it does, unlike {text}")
    total = hashlib.sha256(
        repr((backbone.identity, kind, text, loader, images.kind, images.checksum)).encode()
    )
    root = images.store.local_path
    total.update(str(root.resolve() if root is not None else images.store).encode())
    keys = [images.keys[i] for i in range(len(images))]
    total.update("\0".join(keys).encode("utf-8", "surrogateescape"))
    total.update(images.places.tobytes())
    names = keys if images.kind == "folders" else images.files
    if root is not None:
        for name in names:
            status = (root / name).stat()
            total.update(f"{status.st_size} {status.st_mtime_ns}\n".encode())
    else:
        total.update(repr(sorted(images.store.sizes().items())).encode())
    return total.hexdigest()[:32]


def _file(directory: Path, part: slice) -> Path:
    return directory / f"{part.start:09d}.safetensors"


def _restored(directory: Path, part: slice, rows: np.ndarray) -> bool:
    """Whether the part was there; a damaged one is as good as none."""
    path = _file(directory, part)
    try:
        tensors = load(path.read_bytes())
        saved, digest = tensors["rows"], tensors["sha256"]
        if saved.shape != rows[part].shape or digest.tobytes() != _digest(saved):
            raise ValueError("it does not hold what was written")
    except FileNotFoundError:
        return False
    except OSError:
        raise
    except Exception as error:  # safetensors has its own
        warn(f"{path}: damaged cache file ({first_line(error)}); its features are computed again")
        return False
    rows[part] = saved
    return True


def _save(path: Path, rows: np.ndarray) -> None:
    digest = np.frombuffer(_digest(rows), np.uint8)
    atomic_write(path, save({"rows": rows, "sha256": digest}))


def _digest(rows: np.ndarray) -> bytes:
    return hashlib.sha256(rows.tobytes()).digest()


# --- the computation


def _compute(
    backbone: Backbone,
    images: ImageSet,
    transform: Any,
    kind: Kind,
    loader: str,
    batch_size: int,
    threads: int,
    missing: list[slice],
    rows: np.ndarray,
    directory: Path | None,
    report: Report,
) -> None:
    """Fills the missing parts of `rows`, and writes each as soon as it is whole."""
    if directory is not None:
        directory.mkdir(parents=True, exist_ok=True)
    order = np.concatenate([np.arange(part.start, part.stop) for part in missing])
    total, done = len(rows), len(rows) - len(order)
    size = 1 << (min(batch_size, PART).bit_length() - 1)
    report(done, total)
    writing: Future[None] | None = None
    waiting = deque(missing)
    with ThreadPoolExecutor(1, "ubgen-cache") as pool:
        batches = _batches(images, order, transform, size, threads, loader, backbone)
        with closing(batches):
            position = 0
            for result in _results(backbone, batches, kind):
                indices = order[position : position + len(result)]
                position += len(result)
                _require_finite(result, images, indices, backbone, kind)
                rows[indices] = result
                while directory is not None and waiting and indices[-1] + 1 >= waiting[0].stop:
                    if writing is not None:
                        writing.result()  # a full disk is told now
                    part = waiting.popleft()
                    writing = pool.submit(_save, _file(directory, part), rows[part])
                report(done + position, total)
        if writing is not None:
            writing.result()


def _batches(
    images: ImageSet,
    order: np.ndarray,
    transform: Any,
    batch_size: int,
    threads: int,
    loader: str,
    backbone: Backbone,
) -> Any:
    threads = threads or processors()
    if loader == "dali":
        from ubgen.loading.dali import batches_by_dali

        device = str(backbone.device)
        return batches_by_dali(images, order, transform, batch_size, lambda i: i, threads, None, device)
    return batches_by_threads(images, order, transform, batch_size, lambda i: i, threads)


def _results(backbone: Backbone, batches: Iterator[Batch], kind: Kind) -> Iterator[np.ndarray]:
    """Results on the host. On a GPU one batch behind, so that it has work while the host prepares the next."""
    call = backbone.features if kind == "features" else backbone.logits
    if backbone.device.type != "cuda":
        for batch in batches:
            yield call(backbone.on_device(batch["images"])).numpy()
        return
    before: tuple[Tensor, Any] | None = None
    for batch in batches:
        pixels = batch["images"]
        computed = call(backbone.on_device(pixels if pixels.is_cuda else pixels.pin_memory()))
        host = torch.empty(computed.shape, pin_memory=True)
        host.copy_(computed, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        if before is not None:
            yield _arrived(*before)
        before = host, event
    if before is not None:
        yield _arrived(*before)


def _arrived(host: Tensor, event: Any) -> np.ndarray:
    event.synchronize()
    return host.numpy()


def _require_finite(
    result: np.ndarray, images: ImageSet, indices: np.ndarray, backbone: Backbone, kind: Kind
) -> None:
    if (bad := np.flatnonzero(~np.isfinite(result).all(1))).size:
        raise UserError(
            f"{images.describe(int(indices[bad[0]]))}: backbone {backbone.name} gives NaN or infinity as {kind}; "
            "its weights are damaged, or the precision is too low for them"
        )
