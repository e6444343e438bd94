"""Images to bytes, off the threads that compute."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch
from torch import Tensor

from ubgen.dataset import encode_image, mark_synthetic
from ubgen.dataset.images import JPEG_QUALITY
from ubgen.synth.config import SynthConfig


class CpuEncoder:
    """On the host, several images at a time."""

    on_device = False

    def __init__(self, extension: str, threads: int | None = None) -> None:
        self._extension = extension
        self._pool = ThreadPoolExecutor(threads or min(8, len(os.sched_getaffinity(0))), "ubgen-jpeg")

    def __call__(self, images: Sequence[Tensor]) -> list[bytes]:
        return list(self._pool.map(self._one, images))

    def _one(self, pixels: Tensor) -> bytes:
        return encode_image(pixels.cpu().numpy(), self._extension)


class NvjpegEncoder:
    """On the GPU, through torchvision: only the finished files cross the bus."""

    on_device = True

    def __call__(self, images: Sequence[Tensor]) -> list[bytes]:
        from torchvision.io import encode_jpeg

        if not images:
            return []
        stream = _stream(images[0].device)
        stream.wait_stream(torch.cuda.current_stream(stream.device))  # which may be at work on the images
        with torch.cuda.stream(stream):
            files = encode_jpeg([i.permute(2, 0, 1).contiguous() for i in images], quality=JPEG_QUALITY)
            data = torch.cat(files).cpu()  # one copy for all
        return [mark_synthetic(part.numpy().tobytes()) for part in data.split([len(file) for file in files])]


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """The same for the life of the process, as torchvision's encoder is: whoever calls it, it waits for the stream from
    which it was called first, and lets that one wait for its files."""
    return torch.cuda.Stream(device)


def encoder(config: SynthConfig) -> CpuEncoder | NvjpegEncoder:
    """The one that the configuration names. It is called with images (H,W,3) of uint8, and returns their files."""
    return NvjpegEncoder() if config.resolved_encoder() == "nvjpeg" else CpuEncoder(config.format)
