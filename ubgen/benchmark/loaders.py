"""The sides of `ubgen-bench pretrain`: ubgen's two loaders, timm's, and one built on SPDL, with the same transforms.

Each is a function of (dataset, image size, batch, workers, epoch) that yields the number of images of each batch,
without an end: a small dataset is shown again.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image

from ubgen.core.errors import UserError
from ubgen.core.probes import Probe, dali, spdl
from ubgen.dataset import LabelledImages
from ubgen.loading.augment import posterize
from ubgen.loading.imageset import ImageSet, rank_order
from ubgen.pretrain import Augmentation, training_batches

Side = Callable[[ImageSet, int, int, int, int], Iterator[int]]
OURS, TIMM = "threads", "timm create_loader"


def sides() -> dict[str, Side | Probe]:
    """By name; a probe says why a side cannot run here."""
    return {
        OURS: partial(_ours, "threads"),
        TIMM: _timm,
        "DALI": partial(_ours, "dali") if dali().available else dali(),
        "SPDL": _spdl if spdl().available else spdl(),
    }


def _ours(
    loader: Any, data: ImageSet, image_size: int, batch: int, workers: int, epoch: int
) -> Iterator[int]:
    options = {"batch_size": batch, "image_size": image_size, "threads": workers, "loader": loader}
    while True:
        for loaded in training_batches(data, epoch=epoch, **options):
            yield len(loaded["labels"])


def _timm(data: ImageSet, image_size: int, batch: int, workers: int, epoch: int) -> Iterator[int]:
    from timm.data import create_loader

    recipe = Augmentation()
    loader = create_loader(
        _dataset(data),
        (3, image_size, image_size),
        batch,
        is_training=True,
        use_prefetcher=False,
        re_prob=recipe.erasing,
        re_mode="pixel",
        auto_augment=recipe.rand_augment,
        color_jitter=None,
        interpolation="bicubic",
        num_workers=workers,
        persistent_workers=True,
        device=torch.device("cpu"),
    )
    _mend_posterize(loader.dataset.transform)
    while True:
        for images, _ in loader:
            yield len(images)


def _mend_posterize(transform: Any) -> None:
    """With Pillow 13 timm 1.0.31 stops where it keeps no bit."""
    for step in transform.transforms:
        for operation in getattr(step, "ops", ()):
            if operation.name.startswith("Posterize"):
                operation.aug_fn = posterize


def _dataset(data: ImageSet) -> Any:
    if data.kind == "shards":
        return LabelledImages(data.store)
    if data.kind == "folders":
        from torchvision.datasets import ImageFolder

        return ImageFolder(str(data.store))
    raise UserError(
        f"{data.store}: timm reads no such tars by index; give a dataset of ubgen or an image folder"
    )


def _spdl(data: ImageSet, image_size: int, batch: int, workers: int, epoch: int) -> Iterator[int]:
    """FFmpeg decodes, crops and resizes in SPDL's threads; the rest is timm's transforms."""
    import spdl.io
    from spdl.pipeline import PipelineBuilder
    from timm.data.transforms import RandomResizedCropAndInterpolation
    from timm.data.transforms_factory import create_transform

    recipe = Augmentation()
    rest = create_transform(
        image_size, is_training=True, scale=None, auto_augment=recipe.rand_augment, color_jitter=None,
        interpolation="bicubic", re_prob=recipe.erasing, re_mode="pixel",
    )  # fmt: skip
    rest.transforms = [
        step for step in rest.transforms if not isinstance(step, RandomResizedCropAndInterpolation)
    ]
    _mend_posterize(rest)

    def load(index: int) -> torch.Tensor:
        packets = spdl.io.demux_image(data.read(index))
        frame = torch.empty(3, packets.codec.height, packets.codec.width, device="meta")
        top, left, height, width = RandomResizedCropAndInterpolation.get_params(
            frame, recipe.crop_area, recipe.crop_aspect
        )
        filters = (
            f"crop={width}:{height}:{left}:{top}:exact=1,"
            f"scale={image_size}:{image_size}:flags=bicubic,format=pix_fmts=rgb24"
        )
        pixels = spdl.io.to_numpy(
            spdl.io.convert_frames(spdl.io.decode_packets(packets, filter_desc=filters))
        )
        return rest(Image.fromarray(np.array(pixels)))

    def order() -> Iterator[int]:
        while True:
            yield from rank_order(len(data), 0, epoch, 0, 1).tolist()

    pipeline = (
        PipelineBuilder()
        .add_source(order())
        .pipe(load, concurrency=workers)
        .aggregate(batch)
        .pipe(torch.stack)
        .add_sink(2)
        .build(num_threads=workers + 1)
    )
    with pipeline.auto_stop():
        for images in pipeline:
            yield len(images)
