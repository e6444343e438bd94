"""Settings of a synthesis run."""

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ubgen.core.errors import UserError

_PART = re.compile(r"(\d+)/(\d+)")
_DEVICE = re.compile(r"cpu|cuda(:\d+)?")


@dataclass(frozen=True)
class SynthConfig:
    """Which engine makes how many images of which classes, how good they must be, and who makes them."""

    engine: Path
    """Directory made by ubgen-export."""
    classes: str
    """A shipped class list ("imagenet1k", "miniature", ...) or a UTF-8 text file, one class per line."""
    per_class: int
    """Images of each class."""
    out: str
    """Directory of the dataset, local or behind fsspec (s3://bucket/name); an unfinished one is continued."""
    seed: int = 0
    """Run seed; with the class, the image's index and the attempt it fixes each image's noise."""
    batch: int | Literal["best"] = "best"
    """Images at a time; "best" is the batch size that the engine was made for."""
    steps: int = 50
    """PNDM sampling steps."""
    guidance: float = 2.0
    """Classifier-free guidance scale."""
    prompt: str = "{name}"
    """Prompt of every class, with {name} for its name."""
    prompts: Path | None = None
    """UTF-8 text file of "id<TAB>prompt" lines for the classes whose name would mislead ("crane"); the others keep
    --prompt."""
    same_prompts: bool = False
    """Accept classes whose prompts are equal, or become equal when they are cut to the tokenizer's length."""
    min_similarity: float | None = None
    """Draw an image again whose CLIP similarity to "photo of {name}" is lower than this, from -1 to 1."""
    min_quality: float | None = None
    """Draw an image again whose Q-Align score is lower than this, from 1 (bad) to 5 (excellent)."""
    attempts: int = 10
    """Most draws of one image. A broken image (NaN, one colour) is drawn again even without a threshold."""
    exhausted: Literal["keep", "fail"] = "keep"
    """What becomes of an image that no attempt made good enough: "keep" the best one with a flag, or "fail" the run."""
    shard_size: int = 1000
    """Images in a shard, the unit of resuming."""
    format: Literal["jpg", "png"] = "jpg"
    """JPEG of quality 95 without chroma subsampling, or PNG."""
    encoder: Literal["auto", "cpu", "nvjpeg"] = "auto"
    """Who encodes JPEGs: "auto" is nvjpeg for an engine on a GPU, else libjpeg-turbo on the CPU. Their bytes differ."""
    executor: Literal["local", "static", "ray"] = "local"
    """"local": processes on this machine; "static": one part of a run, for job arrays; "ray": a Ray cluster."""
    workers: int | Literal["auto"] = "auto"
    """Workers of the local and ray executors; "auto" is one for each GPU, on a CPU one (ray: one for each node)."""
    part: str | None = None
    """Which part the static executor makes: "3/16" is the third of sixteen."""
    ray_address: str | None = None
    """Ray cluster to join, such as "auto" or "ray://head:10001"; without it one is started on this machine."""
    device: str | None = None
    """Where the engine runs: "cpu", "cuda" or "cuda:1"; the device that it was made for if not given."""
    licence: str = ""
    """Licence of the dataset, a text for its card."""
    base_model: str = ""
    """Name of the base model for the dataset's card, such as "stable-diffusion-v1-5/stable-diffusion-v1-5"; that of its
    directory if not given."""
    overwrite: bool = False
    """Delete what a run of ubgen-synth left in the output directory, and start again."""

    def check(self) -> None:
        """UserError naming the first option that is out of range."""
        if not self.out.strip():
            raise UserError("--out must name a directory for the dataset, not be empty")
        smallest = {
            "per-class": self.per_class,
            "shard-size": self.shard_size,
            "steps": self.steps,
            "attempts": self.attempts,
            "batch": 1 if self.batch == "best" else self.batch,
            "workers": 1 if self.workers == "auto" else self.workers,
        }
        for name, value in smallest.items():
            if value < 1:
                raise UserError(f"--{name} must be at least 1, not {value}")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"--seed must lie in 0..2^63-1, not {self.seed}")
        if not abs(self.guidance) < 1e6:  # also refuses NaN
            raise UserError(f"--guidance must be a finite number, not {self.guidance}")
        _within("min-similarity", self.min_similarity, -1.0, 1.0)
        _within("min-quality", self.min_quality, 1.0, 5.0)
        if "{name}" not in self.prompt:
            raise UserError(
                f"--prompt {self.prompt!r} has no {{name}}: every class would get the same images"
            )
        self._check_executor()

    def _check_executor(self) -> None:
        check_device(self.device)
        if (self.executor == "static") != (self.part is not None):
            raise UserError("--executor static and --part go together: --executor static --part 3/16")
        if self.part is not None:
            self.static_part()
        if self.executor == "static" and self.overwrite:
            raise UserError(
                "--overwrite does not go with --executor static: parts would delete each other's work"
            )
        if self.ray_address is not None and self.executor != "ray":
            raise UserError("--ray-address needs --executor ray")
        if self.encoder == "nvjpeg" and (
            self.format != "jpg" or not self.resolved_device().startswith("cuda")
        ):
            raise UserError("--encoder nvjpeg needs an engine on a GPU (--device cuda) and --format jpg")

    def static_part(self) -> tuple[int, int]:
        """(index from 0, number of parts) of --part."""
        match = _PART.fullmatch(self.part or "")
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            raise UserError(
                f'--part must be like "3/16", with the first from 1 to the second, not {self.part!r}'
            )
        return int(match[1]) - 1, int(match[2])

    def resolved_device(self) -> str:
        """`device`, in which `synthesise` fills in the engine's own where none is given; "cpu" without an engine."""
        return self.device or "cpu"

    def resolved_encoder(self) -> Literal["cpu", "nvjpeg"]:
        """The encoder that "auto" stands for."""
        if self.format == "png":
            return "cpu"
        if self.encoder == "auto":
            return "nvjpeg" if self.resolved_device().startswith("cuda") else "cpu"
        return self.encoder

    def worker_threads(self, workers: int) -> int:
        """Compute threads of each of `workers` processes on this machine."""
        return max(1, len(os.sched_getaffinity(0)) // workers)


def check_device(device: str | None) -> None:
    """UserError for the name of no device that an engine runs on."""
    if device is not None and not _DEVICE.fullmatch(device):
        raise UserError(f'--device must be "cpu", "cuda" or one GPU, such as "cuda:1", not {device!r}')


def _within(name: str, value: float | None, low: float, high: float) -> None:
    if value is not None and not (math.isfinite(value) and low <= value <= high):
        raise UserError(f"--{name} must lie in {low:g}..{high:g}, not {value}")
