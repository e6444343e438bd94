"""Images to bytes, off the threads that compute."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from ubgen.dataset import encode_image, mark_synthetic
from ubgen.dataset.shards import JPEG_QUALITY
from ubgen.synth.config import SynthConfig
from ubgen.synth.selection import Chosen

Encoded = tuple[Chosen, bytes]


class CpuEncoder:
    """On the host, several images at a time."""

    on_device = False

    def __init__(self, extension: str, threads: int | None = None) -> None:
        self._extension = extension
        self._pool = ThreadPoolExecutor(threads or min(8, len(os.sched_getaffinity(0))), "ubgen-jpeg")

    def __call__(self, chosen: Sequence[Chosen]) -> list[Encoded]:
        return list(zip(chosen, self._pool.map(self._one, chosen), strict=True))

    def _one(self, chosen: Chosen) -> bytes:
        return encode_image(chosen.made.pixels.numpy(), self._extension)


class NvjpegEncoder:
    """On the GPU, through torchvision: only the finished files cross the bus."""

    on_device = True

    def __call__(self, chosen: Sequence[Chosen]) -> list[Encoded]:
        from torchvision.io import encode_jpeg

        planes: list[Tensor] = [c.made.pixels.permute(2, 0, 1).contiguous() for c in chosen]
        files = encode_jpeg(planes, quality=JPEG_QUALITY) if planes else []
        sizes = [len(file) for file in files]
        data = torch.cat(files).cpu() if files else torch.empty(0)  # one copy for all
        parts = [mark_synthetic(part.numpy().tobytes()) for part in data.split(sizes)]
        return list(zip(chosen, parts, strict=True))


def encoder(config: SynthConfig) -> CpuEncoder | NvjpegEncoder:
    """The one that the configuration names."""
    return NvjpegEncoder() if config.resolved_encoder() == "nvjpeg" else CpuEncoder(config.format)
