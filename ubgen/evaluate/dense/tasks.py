"""What detection and segmentation give the training loop: samples, losses, a learning rate, figures, pictures."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate.utils import gather_object
from PIL import Image
from torch import Tensor, nn

from ubgen.evaluate.backbone import Backbone
from ubgen.evaluate.dense.ade20k import AdeImages, open_ade20k
from ubgen.evaluate.dense.coco import CocoImages, open_coco
from ubgen.evaluate.dense.detection import build_mask_rcnn
from ubgen.evaluate.dense.figures import average_precision, confusion, segmentation_figures
from ubgen.evaluate.dense.pictures import fixed_images, sheet, with_classes, with_objects
from ubgen.evaluate.dense.segmentation import UperNet
from ubgen.evaluate.dense.settings import (
    DetectSettings,
    SegmentSettings,
    Training,
    segmentation_updates,
    updates_per_epoch,
)
from ubgen.evaluate.dense.stages import as_tensor
from ubgen.evaluate.dense.transforms import fitted_size, flipped, resized, training_crop
from ubgen.measures.splits import image_share

_LR_BATCH = 16  # images that the learning rates are given for
Loaded = Callable[[Callable[[int], Any], Iterable[int]], Iterator[Any]]
"""Maps a function over indices, in order, by threads that work ahead."""


class Task(Protocol):
    """A share of a dataset's training images, its validation images, and how a network is trained on them."""

    @property
    def evaluation(self) -> str: ...

    @property
    def dataset(self) -> str: ...

    @property
    def settings(self) -> Training: ...

    @property
    def training(self) -> Any: ...

    @property
    def validation(self) -> Any: ...

    @property
    def chosen(self) -> np.ndarray:
        """Indices of the training images that are used."""

    @property
    def wide(self) -> np.ndarray | None:
        """Of the chosen images: which are wide and which are high, where batches must not mix them."""

    @property
    def updates(self) -> int: ...

    def build(self, backbone: Backbone) -> nn.Module: ...

    def optimizer(self, network: nn.Module) -> torch.optim.Optimizer: ...

    def lr(self, done: int) -> float:
        """Of the update that follows `done` others."""

    def sample(self, index: int, rng: np.random.Generator) -> Any: ...

    def losses(self, network: nn.Module, samples: list[Any], device: torch.device) -> dict[str, Tensor]: ...

    def measure(
        self, network: nn.Module, device: torch.device, part: tuple[int, int], loaded: Loaded
    ) -> dict[str, float]:
        """Figures in percent, complete on process 0; `part`: this process, and how many there are."""

    def draw(self, network: nn.Module, device: torch.device) -> Image.Image: ...


@dataclass(frozen=True)
class Detection:
    """Mask R-CNN on COCO."""

    settings: DetectSettings
    training: CocoImages
    validation: CocoImages
    chosen: np.ndarray
    evaluation: str = "detect"
    dataset: str = "coco"

    @cached_property
    def wide(self) -> np.ndarray | None:
        return self.training.wide[self.chosen]

    @property
    def updates(self) -> int:
        return self.settings.epochs * updates_per_epoch(len(self.chosen), self.settings)

    def build(self, backbone: Backbone) -> nn.Module:
        return build_mask_rcnn(backbone, len(self.training.class_names), self.settings)

    def optimizer(self, network: nn.Module) -> torch.optim.Optimizer:
        return _sgd(network, self.settings.lr, self.settings.weight_decay, self.settings)

    def lr(self, done: int) -> float:
        """Linear from a thousandth over the warm-up; divided by 10 after the epochs `drops`."""
        settings = self.settings
        epoch = done // updates_per_epoch(len(self.chosen), settings)
        rate = _scaled(settings.lr, settings) * 0.1 ** sum(epoch >= drop for drop in settings.drops)
        return rate * (
            min(1.0, 0.001 + 0.999 * done / max(settings.warmup - 1, 1)) if settings.warmup else 1.0
        )

    def sample(self, index: int, rng: np.random.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        pixels, target = self.training.pixels(index), self.training.target(index)
        if rng.uniform() < 0.5:
            pixels, target = flipped(pixels, target)
        return as_tensor(pixels), {key: torch.from_numpy(value) for key, value in target.items()}

    def losses(self, network: nn.Module, samples: list[Any], device: torch.device) -> dict[str, Tensor]:
        images = [image.to(device, non_blocking=True) for image, _ in samples]
        targets = [
            {key: value.to(device, non_blocking=True) for key, value in target.items()}
            for _, target in samples
        ]
        losses: dict[str, Tensor] = network(images, targets)
        return losses

    def measure(
        self, network: nn.Module, device: torch.device, part: tuple[int, int], loaded: Loaded
    ) -> dict[str, float]:
        mine = range(part[0], len(self.validation), part[1])
        found = []
        for index, pixels in zip(mine, loaded(self.validation.pixels, mine), strict=True):
            found.extend(self._records(index, self._predicted(network, pixels, device)))
        everything = gather_object(found) if part[1] > 1 else found
        if part[0]:
            return {}
        box, mask = (average_precision(self.validation.content, everything, k) for k in ("bbox", "segm"))
        return {f"box {k}": v for k, v in box.items()} | {f"mask {k}": v for k, v in mask.items()}

    def draw(self, network: nn.Module, device: torch.device) -> Image.Image:
        data, names, pairs = self.validation, self.training.class_names, []
        for index in fixed_images(len(data)):
            pixels = data.pixels(index)
            objects = self._predicted(network, pixels, device)
            pairs.append(
                (with_objects(pixels, data.target(index), names), with_objects(pixels, objects, names))
            )
        return sheet(pairs)

    def _predicted(
        self, network: nn.Module, pixels: np.ndarray, device: torch.device
    ) -> dict[str, np.ndarray]:
        found = network([as_tensor(pixels).to(device)])[0]
        return {
            "boxes": found["boxes"].float().cpu().numpy(),
            "labels": found["labels"].cpu().numpy(),
            "scores": found["scores"].float().cpu().numpy(),
            "masks": (found["masks"][:, 0] > 0.5).cpu().numpy(),
        }

    def _records(self, index: int, found: dict[str, np.ndarray]) -> list[dict[str, Any]]:
        """In COCO's result format."""
        from pycocotools import mask as masks  # of the extra "dense"

        corners = found["boxes"].astype(float)
        boxes = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1)
        return [
            {
                "image_id": self.validation.images[index]["id"],
                "category_id": self.validation.category_ids[int(label) - 1],
                "bbox": box.tolist(),
                "score": float(score),
                "segmentation": masks.encode(np.asfortranarray(mask, np.uint8)),
            }
            for box, label, score, mask in zip(
                boxes, found["labels"], found["scores"], found["masks"], strict=True
            )
        ]


@dataclass(frozen=True)
class Segmentation:
    """UPerNet on ADE20K."""

    settings: SegmentSettings
    training: AdeImages
    validation: AdeImages
    chosen: np.ndarray
    fraction: float
    evaluation: str = "segment"
    dataset: str = "ade20k"
    wide: np.ndarray | None = None

    @property
    def updates(self) -> int:
        return segmentation_updates(self.fraction, self.settings)

    def build(self, backbone: Backbone) -> nn.Module:
        return UperNet(backbone, len(self.training.class_names), self.settings)

    def optimizer(self, network: nn.Module) -> torch.optim.Optimizer:
        return _sgd(network, self.settings.lr, self.settings.weight_decay, self.settings)

    def lr(self, done: int) -> float:
        """A polynomial of power 0.9, without a warm-up."""
        settings = self.settings
        low, high = _scaled(settings.least_lr, settings), _scaled(settings.lr, settings)
        return (high - low) * (1 - done / self.updates) ** 0.9 + low

    def sample(self, index: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """(3, crop, crop) in [0, 1] and (crop, crop); smaller images are filled up with the mean and with IGNORED."""
        side = self.settings.crop
        pixels, labels = training_crop(*self.training.read(index), self.settings, rng)
        image, mask = as_tensor(pixels), torch.from_numpy(labels.astype(np.int64))
        right, below = side - mask.shape[1], side - mask.shape[0]
        if right or below:
            image = nn.functional.pad(image, (0, right, 0, below), value=float("nan"))
            mask = nn.functional.pad(mask, (0, right, 0, below), value=255)
        return image, mask

    def losses(self, network: nn.Module, samples: list[Any], device: torch.device) -> dict[str, Tensor]:
        images, labels = (
            torch.stack(part).to(device, non_blocking=True) for part in zip(*samples, strict=True)
        )
        losses: dict[str, Tensor] = network(images, labels)
        return losses

    def measure(
        self, network: nn.Module, device: torch.device, part: tuple[int, int], loaded: Loaded
    ) -> dict[str, float]:
        classes = len(self.training.class_names)
        counts = np.zeros((classes, classes), np.int64)
        for pixels, labels in loaded(self.validation.read, range(part[0], len(self.validation), part[1])):
            counts += confusion(labels, self._predicted(network, pixels, device), classes)
        if part[1] > 1:
            total = torch.from_numpy(counts).to(device)
            torch.distributed.all_reduce(total)
            counts = total.cpu().numpy()
        return segmentation_figures(counts)

    def draw(self, network: nn.Module, device: torch.device) -> Image.Image:
        classes, pairs = len(self.training.class_names), []
        for index in fixed_images(len(self.validation)):
            pixels, labels = self.validation.read(index)
            predicted = self._predicted(network, pixels, device)
            pairs.append((with_classes(pixels, labels, classes), with_classes(pixels, predicted, classes)))
        return sheet(pairs)

    def _predicted(self, network: nn.Module, pixels: np.ndarray, device: torch.device) -> np.ndarray:
        """(H, W) labels of the whole image, at its own size."""
        settings, size = self.settings, pixels.shape[:2]
        small = resized(pixels, fitted_size(size, settings.short_side, settings.long_side))
        logits = network(as_tensor(small)[None].to(device)).float()
        logits = nn.functional.interpolate(logits, size, mode="bilinear", align_corners=False)
        labels: np.ndarray = logits[0].argmax(0).cpu().numpy()
        return labels


def open_detection(
    root: Path, settings: DetectSettings, fraction: float, seeds: Iterable[int]
) -> list[Detection]:
    """One task for each seed."""
    training, validation = open_coco(root, settings.least_side)
    return [
        Detection(settings, training, validation, image_share(training.names, fraction, seed))
        for seed in seeds
    ]


def open_segmentation(
    root: Path, settings: SegmentSettings, fraction: float, seeds: Iterable[int]
) -> list[Segmentation]:
    """One task for each seed."""
    training, validation = open_ade20k(root)
    return [
        Segmentation(settings, training, validation, image_share(training.names, fraction, seed), fraction)
        for seed in seeds
    ]


def _sgd(network: nn.Module, lr: float, weight_decay: float, settings: Training) -> torch.optim.Optimizer:
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    return torch.optim.SGD(
        trained, _scaled(lr, settings), momentum=settings.momentum, weight_decay=weight_decay
    )


def _scaled(lr: float, settings: Training) -> float:
    """The linear rule: in proportion to the images of an update."""
    return lr * settings.batch_size / _LR_BATCH
