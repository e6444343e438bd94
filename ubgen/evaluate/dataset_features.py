"""Features of every image of a dataset, by CLIP or a timm network, written to a file (`ubgen-dataset features`)."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ubgen.core.console import Report
from ubgen.core.errors import UserError
from ubgen.core.stage import content_hash
from ubgen.dataset.tools.features import FeaturesNote, write_features
from ubgen.evaluate.backbone import Backbone, load_backbone
from ubgen.evaluate.extract import extract
from ubgen.loading.decode import decode
from ubgen.loading.imageset import open_image_set
from ubgen.rewards.clip import Clip
from ubgen.rewards.preprocess import clip_preprocess


@dataclass(frozen=True)
class ClipTransform:
    """What synthesis does to an image before CLIP sees it; 3HW float32."""

    size: int

    def __call__(self, data: bytes, seed: int = 0) -> np.ndarray:
        pixels = torch.from_numpy(decode(data).copy()).permute(2, 0, 1)[None].float() / 255
        return clip_preprocess(pixels, self.size)[0].contiguous().numpy()


class ClipEncoder:
    """The image tower of a CLIP, with the face of a `Backbone` that `extract` needs."""

    outputs = 0

    def __init__(self, path: Path, device: str = "auto") -> None:
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(device)
        self._clip = Clip.load(path, device=self.device)
        self.name, self.dim = f"CLIP {Path(path).resolve().name}", self._clip.dim
        self.identity = content_hash(path)
        self.transform = ClipTransform(self._clip.image_size)

    @torch.inference_mode()
    def features(self, images_B3HW: Tensor) -> Tensor:
        """(B, D) float32."""
        return self._clip.encode_pixels(images_B3HW).float()

    def on_device(self, images: Tensor) -> Tensor:
        return images.to(self.device, non_blocking=True)


def compute_features(
    dataset: str,
    out: Path,
    *,
    clip: Path | None = None,
    encoder: str | None = None,
    classes: str | None = None,
    cache: Path | None = None,
    batch_size: int = 128,
    device: str = "auto",
    report: Report,
) -> FeaturesNote:
    """Write `out` (.npy) and the note beside it; what is computed is kept in `cache` until then, or for good if given.

    UserError unless exactly one of `clip` (a directory) and `encoder` (as for `ubgen-eval`) is given.
    """
    if (clip is None) == (encoder is None):
        raise UserError("give one of --clip DIR and --encoder timm:NAME@FILE")
    if out.suffix != ".npy" or not out.absolute().parent.is_dir():
        raise UserError(f"--out {out}: expected a file name that ends in .npy, in a directory that exists")
    images = open_image_set(dataset, classes)
    network: Any
    if clip is not None:
        network = ClipEncoder(clip, device)
        transform: Any = network.transform
    else:
        network = load_backbone(str(encoder), device=device)
        assert isinstance(network, Backbone)
        transform = network.transform()
    parts = cache or out.with_name(f"{out.name}.parts")
    rows = extract(
        network, images, transform, cache=parts, batch_size=batch_size, loader="threads", report=report
    )
    note = FeaturesNote(
        network.name, network.identity, str(images.store), images.fingerprint(), len(rows), rows.shape[1]
    )
    write_features(out, rows, note)
    if cache is None:
        shutil.rmtree(parts)
    return note
