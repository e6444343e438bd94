"""Random numbers that belong to an identity, not to a moment.

A generator seeded by the hash of what the numbers are *for* gives the same numbers whatever the batch size, the
number of workers, the order of the work, or how often it was interrupted.
"""

import hashlib

import torch
from torch import Tensor


def hashed_generator(*identity: int | str) -> torch.Generator:
    """A CPU generator seeded by the BLAKE2b hash of `identity`, e.g. ("latents", seed, update, rank)."""
    text = "\x1f".join(str(part) for part in ("ubgen", *identity))
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest, "little") >> 1)  # 63 bits: torch's range


def initial_noise(
    seed: int, class_index: int, image_index: int, shape: tuple[int, ...], attempt: int = 0
) -> Tensor:
    """Standard normal float32 CPU tensor of `shape`, fixed by the image's identity alone.

    `attempt` counts the retries of an image whose earlier samples were rejected.
    """
    generator = hashed_generator("image", seed, class_index, image_index, attempt)
    return torch.randn(shape, generator=generator)
