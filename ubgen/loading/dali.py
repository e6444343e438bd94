"""The loader on NVIDIA DALI: the same samples, order and random draws as the threads', decoded and augmented by DALI.

DALI's own readers shuffle within a buffer and tie shards to ranks, so that an epoch's order would depend on the number
of ranks and of shards. Here DALI gets the encoded images through an external source, in our order. What is random is
drawn by timm's code for each sample (`TrainingTransform.draw`), and given to DALI as arguments. So nothing depends on
the state of DALI's generators, and an epoch goes on in its middle by counting.

Images that are not plain JPEGs (`image_size` is None, or the end is missing) are decoded on the host, as by threads,
and handed on as PPM. Geometric operations of RandAugment interpolate linearly, where timm's are cubic.
"""

import importlib
import math
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ubgen.core.errors import UserError, is_out_of_memory
from ubgen.core.probes import require_dali
from ubgen.loading.augment import TrainingTransform
from ubgen.loading.decode import (
    MEAN,
    STD,
    BrokenSample,
    Draw,
    EvaluationTransform,
    broken,
    decode,
    image_size,
)
from ubgen.loading.imageset import ImageSet

Batch = dict[str, Any]
_AHEAD = 3
_WARP = 1
_OTHERS = {
    "AutoContrast": 2,
    "Equalize": 3,
    "Invert": 4,
    "PosterizeIncreasing": 5,
    "SolarizeIncreasing": 6,
    "SolarizeAdd": 7,
    "ColorIncreasing": 8,
    "ContrastIncreasing": 9,
    "BrightnessIncreasing": 10,
    "SharpnessIncreasing": 11,
}
_WARPS = ("Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel")
_BLUR = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13  # Pillow's SMOOTH
_LAYERS = 2


def batches_by_dali(
    data: ImageSet,
    order: np.ndarray,
    transform: TrainingTransform | EvaluationTransform,
    batch_size: int,
    seeds: Callable[[int], int],
    threads: int,
    on_broken: Callable[[BrokenSample], None] | None = None,
    device: str = "cpu",
) -> Generator[Batch, None, None]:
    """As `batches_by_threads`; images lie on `device`."""
    _require_known(transform)
    queue = deque[tuple[list[int], list[Draw]]]()
    source = _source(data, order, transform, batch_size, seeds, threads, on_broken, queue)
    pipe = _pipeline(source, transform, batch_size, threads, device)
    try:
        while True:
            try:
                (output,) = pipe.run()
            except StopIteration:
                return
            except RuntimeError as error:  # it does not say which image
                if is_out_of_memory(error):
                    raise
                _name_broken(data, [index for indices, _ in queue for index in indices])
                raise
            indices, draws = queue.popleft()
            images = _torch(output, device)
            for image, drawn in zip(images, draws, strict=True):
                _erase(image, drawn)
            labels = torch.from_numpy(data.labels[indices].astype(np.int64))
            yield {"images": images, "labels": labels, "keys": [data.keys[i] for i in indices]}
    finally:
        source.close()


def _require_known(transform: Any) -> None:
    if _augments(transform) and (strange := {*transform.names} - {*_OTHERS, *_WARPS}):
        raise UserError(
            f"--loader dali has no {min(strange)} of {transform.settings.rand_augment!r}; add inc1, or use threads"
        )


def _name_broken(data: ImageSet, indices: list[int]) -> None:
    for index in indices:
        try:
            decode(data.read(index))
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise broken(data.describe(index), error) from error


def _source(
    data: ImageSet,
    order: np.ndarray,
    transform: Any,
    batch_size: int,
    seeds: Callable[[int], int],
    threads: int,
    on_broken: Callable[[BrokenSample], None] | None,
    queue: deque[tuple[list[int], list[Draw]]],
) -> Generator[tuple[Any, ...], None, None]:
    """Inputs of the pipeline, a batch at a time; what DALI does not see goes to `queue`."""

    layers = _LAYERS if _augments(transform) else 0

    def load(index: int) -> tuple[np.ndarray, Draw] | BrokenSample:
        try:
            encoded, size = _plain(data.read(index))
            return np.frombuffer(encoded, np.uint8), transform.draw(size, seeds(index))
        except Exception as error:
            if is_out_of_memory(error):
                raise
            return broken(data.describe(index), error)

    chunks = (order[i : i + batch_size].tolist() for i in range(0, len(order), batch_size))
    waiting = deque[tuple[list[int], list[Future[Any]]]]()
    with ThreadPoolExecutor(threads, "ubgen-loader") as pool:

        def submit(count: int) -> None:
            for chunk in islice(chunks, count):
                waiting.append((chunk, [pool.submit(load, index) for index in chunk]))

        submit(_AHEAD)
        while waiting:
            chunk, futures = waiting.popleft()
            results = [future.result() for future in futures]
            submit(1)
            kept = []
            for index, result in zip(chunk, results, strict=True):
                if not isinstance(result, BrokenSample):
                    kept.append((index, *result))
                elif on_broken is None:
                    raise result
                else:
                    on_broken(result)
            if kept:
                indices, images, draws = (list(part) for part in zip(*kept, strict=True))
                queue.append((indices, draws))
                yield (images, *_arguments(draws, transform.size, layers))


def _augments(transform: Any) -> bool:
    return isinstance(transform, TrainingTransform) and bool(transform.settings.rand_augment)


def _plain(data: bytes) -> tuple[bytes, tuple[int, int]]:
    """What DALI decodes as we do, with its height and width. A JPEG without its end would come out grey in places."""
    size = image_size(data)
    if size is not None and data.rstrip(b"\0")[-2:] == b"\xff\xd9":
        return data, size
    pixels = decode(data)
    height, width = pixels.shape[:2]
    return b"P6 %d %d 255\n" % (width, height) + pixels.tobytes(), (height, width)


def _arguments(draws: list[Draw], size: int, layers: int) -> Iterator[list[np.ndarray]]:
    yield [np.array(draw.box[:2], np.int32) for draw in draws]
    yield [np.array(draw.box[2:], np.int32) for draw in draws]
    yield [np.array(draw.resized, np.float32) for draw in draws]
    yield [np.array(draw.flip, np.int32) for draw in draws]
    for layer in range(layers):
        operations = [draw.operations[layer] if layer < len(draw.operations) else None for draw in draws]
        yield from zip(*(_operation(operation, size) for operation in operations), strict=True)


def _operation(operation: tuple[str, float] | None, size: int) -> tuple[np.ndarray, ...]:
    """Kind, value, matrix from output to input, and sharpening kernel."""
    kind, value, matrix = 0, 0.0, np.eye(2, 3, dtype=np.float32)
    if operation is not None:
        name, value = operation
        kind = _OTHERS.get(name, _WARP)
        if kind == _WARP:
            matrix = _matrix(name, value, size)
        if name.startswith("Posterize"):
            value = 2.0 ** (
                8 - value
            )  # the step between the values that are left; 256, for no bits, leaves black
    ident = np.zeros((3, 3), np.float32)
    ident[1, 1] = 1
    kernel = (1 - value) * _BLUR + value * ident if kind == _OTHERS["SharpnessIncreasing"] else ident
    return np.array(kind, np.int32), np.array(value, np.float32), matrix, kernel.astype(np.float32)


def _matrix(name: str, value: float, size: int) -> np.ndarray:
    """Pillow's: from a pixel of the output to one of the input."""
    if name == "Rotate":
        cos, sin, centre = math.cos(math.radians(-value)), math.sin(math.radians(-value)), size / 2
        rows = [
            [cos, sin, centre - cos * centre - sin * centre],
            [-sin, cos, centre + sin * centre - cos * centre],
        ]
    else:
        x, y = float("X" in name), float("Y" in name)
        if name.startswith("Shear"):
            rows = [[1, value * x, 0], [value * y, 1, 0]]
        else:
            rows = [[1, 0, value * size * x], [0, 1, value * size * y]]
    return np.array(rows, np.float32)


def _pipeline(source: Any, transform: Any, batch_size: int, threads: int, device: str) -> Any:
    """The pipeline; `nvidia` is imported here alone."""
    require_dali()
    fn = importlib.import_module("nvidia.dali.fn")
    dali = SimpleNamespace(
        fn=fn,
        equalize=getattr(fn, "equalize", None) or fn.experimental.equalize,  # the names of DALI before 2.4
        filter=getattr(fn, "filter", None) or fn.experimental.filter,
        types=importlib.import_module("nvidia.dali.types"),
        ops=importlib.import_module("nvidia.dali.auto_aug.augmentations"),
    )
    define = importlib.import_module("nvidia.dali").pipeline_def
    gpu = device != "cpu"
    augmenting = _augments(transform)
    graph = define(_graph, enable_conditionals=augmenting)
    pipe = graph(
        dali,
        source,
        transform,
        augmenting,
        gpu,
        batch_size=batch_size,
        num_threads=threads,
        device_id=torch.device(device).index or 0 if gpu else None,
        prefetch_queue_depth=2,
    )
    pipe.build()
    return pipe


def _graph(dali: Any, source: Any, transform: Any, augmenting: bool, gpu: bool) -> Any:
    fn, types = dali.fn, dali.types
    linear = getattr(transform, "interpolation", "bicubic") == "bilinear"
    layers = _LAYERS if augmenting else 0
    inputs = fn.external_source(source=source, num_outputs=5 + 4 * layers, batch=True)
    encoded, start, shape, resized, flip = inputs[:5]
    image = fn.decoders.image_slice(
        encoded,
        start=start,
        shape=shape,
        axis_names="HW",
        device="mixed" if gpu else "cpu",
        output_type=types.RGB,
    )
    interpolation = types.INTERP_LINEAR if linear else types.INTERP_CUBIC
    image = fn.resize(image, size=resized, interp_type=interpolation, antialias=True)
    if augmenting:
        image = fn.flip(image, horizontal=flip, vertical=0)
        for layer in range(layers):
            kind, value, matrix, kernel = inputs[5 + 4 * layer : 9 + 4 * layer]
            image = _apply(dali, image, kind, value, matrix, kernel, gpu)
        flip = 0
    return fn.crop_mirror_normalize(
        image,
        dtype=types.FLOAT,
        output_layout="CHW",
        crop=(transform.size, transform.size),
        mean=[255 * value for value in getattr(transform, "mean", MEAN)],
        std=[255 * value for value in getattr(transform, "std", STD)],
        mirror=flip,
    )


def _apply(dali: Any, image: Any, kind: Any, value: Any, matrix: Any, kernel: Any, gpu: bool) -> Any:
    """One operation of RandAugment; DALI turns the conditions into a split of the batch."""
    fn, types, ops = dali.fn, dali.types, dali.ops
    there = value.gpu() if gpu else value
    if kind == 1:
        # DALI fills all channels with one value: 0 of the difference to timm's fill
        fill = types.Constant([round(255 * mean) for mean in MEAN], dtype=types.INT16)
        image = fn.warp_affine(
            fn.cast(image, dtype=types.INT16) - fill, matrix=matrix, inverse_map=True, fill_value=0
        )
        image = fn.cast(image + fill, dtype=types.UINT8)
    elif kind == 2:
        image = ops.auto_contrast.op(image, None)
    elif kind == 3:
        image = dali.equalize(image)
    elif kind == 4:
        image = types.Constant(255, dtype=types.UINT8) - image
    elif kind == 5:
        step = fn.cast(there, dtype=types.INT32)
        image = fn.cast(image // step * step, dtype=types.UINT8)
    elif kind == 6:
        image = ops.solarize.op(image, there)
    elif kind == 7:
        image = ops.solarize_add.op(image, fn.cast(there, dtype=types.UINT8))
    elif kind == 8:
        image = fn.saturation(image, saturation=value)
    elif kind == 9:
        image = ops.contrast.op(image, there)
    elif kind == 10:
        image = fn.brightness(image, brightness=value)
    elif kind == 11:
        image = dali.filter(image, kernel.gpu() if gpu else kernel)
    return image


def _torch(output: Any, device: str) -> Tensor:
    if device == "cpu":
        return torch.from_numpy(np.array(output.as_tensor()))  # a copy: DALI uses its buffer again
    return torch.utils.dlpack.from_dlpack(output.as_tensor()).clone()


def _erase(image: Tensor, draw: Draw) -> None:
    if draw.erased is not None:
        top, left, noise = draw.erased
        image[:, top : top + noise.shape[1], left : left + noise.shape[2]] = noise.to(image.device)
