"""Transfer (paper, Table 1): a linear probe on frozen features, as the trex toolbox trains it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ubgen.core.console import Report
from ubgen.core.errors import UserError
from ubgen.evaluate.backbone import Backbone
from ubgen.evaluate.datasets import TransferData
from ubgen.evaluate.extract import extract
from ubgen.evaluate.results import Figure, Result
from ubgen.evaluate.settings import TransferSettings
from ubgen.loading.imageset import ImageSet
from ubgen.measures.intervals import (
    Interval,
    bootstrap_mean,
    bootstrap_mean_per_class,
    mean_per_class,
    top1,
)
from ubgen.measures.probe import search_probe


def transfer(
    backbone: Backbone,
    data: TransferData,
    settings: TransferSettings,
    *,
    cache: Path | None = None,
    report: Report,
    **extraction: Any,
) -> Result:
    """Test accuracy of a logistic regression on the backbone's features: top-1, and the mean over classes.

    For each seed, C is searched with the validation images of that seed; the probe is fitted again to train+val, and
    predicts the test images once. Figures are means over the seeds; their intervals come from resampling test images,
    whose correctness is averaged over the seeds. `extraction` are options of `extract`.

    UserError for an image that cannot be decoded, features that are not finite, and a dataset without two training
    images of any class.
    """
    steps = Steps(data, settings.seeds, report)
    features = Features.of(backbone, data, cache, steps, extraction)
    probed = []
    for number, seed in enumerate(settings.all_seeds):
        steps.probe(number, f"probe {number + 1} of {settings.seeds}")
        probed.append(probe(features, data, *data.split(seed), settings, seed))
    steps.probe(settings.seeds, "")
    fitted, validation = data.split(settings.seed)
    return Result(
        "transfer",
        data.name,
        figures=accuracy_figures(probed, data.test.labels),
        counts={
            "classes": len(data.trainval.class_ids),
            "train": len(fitted),
            "validation": len(validation),
            "test": len(data.test),
        },
        details={"runs": [run.describe(data.test.labels) for run in probed], "settings": asdict(settings)},
        predictions=prediction_columns(data.test, {"seed": [run.seed for run in probed]}, probed),
        splits=data.file_lists(settings.all_seeds),
    )


@dataclass(frozen=True, eq=False)
class Probed:
    """One probe: how it was found, and what it says of the test images."""

    seed: int
    C: float
    validation: float
    """Top-1 on the validation images with this C, in 0..1."""
    predicted: np.ndarray

    def describe(self, labels: np.ndarray) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "C": self.C,
            "validation top-1": 100 * self.validation,
            "top-1": 100 * top1(self.predicted, labels),
            "mean per class": 100 * mean_per_class(self.predicted, labels),
        }


@dataclass(frozen=True, eq=False)
class Features:
    """(N, D) float32 of each part of a dataset, and where probes of them are fitted."""

    trainval: np.ndarray
    test: np.ndarray
    device: str

    @classmethod
    def of(
        cls,
        backbone: Backbone,
        data: TransferData,
        cache: Path | None,
        steps: "Steps",
        extraction: Mapping[str, Any],
    ) -> "Features":
        """The shorter side is resized to the backbone's input size and the middle is cut out, as in the toolbox."""
        transform = backbone.transform(crop_ratio=1.0)

        def part(images: ImageSet, before: int) -> np.ndarray:
            count = steps.extraction(before)
            return extract(backbone, images, transform, cache=cache, report=count, **extraction)

        trainval, test = part(data.trainval, 0), part(data.test, len(data.trainval))
        return cls(trainval, test, str(backbone.device))


class Steps:
    """Progress: the features count as much as all probes together, in images."""

    def __init__(self, data: TransferData, probes: int, report: Report) -> None:
        self._images, self._probes, self._report = len(data.trainval) + len(data.test), probes, report

    def extraction(self, before: int) -> Report:
        def count(done: int, total: int, note: str = "") -> None:
            self._report(before + done, 2 * self._images, "features")

        return count

    def probe(self, done: int, note: str) -> None:
        self._report(self._images + self._images * done // self._probes, 2 * self._images, note)


def probe(
    features: Features,
    data: TransferData,
    fitted: np.ndarray,
    validation: np.ndarray,
    settings: TransferSettings,
    seed: int,
) -> Probed:
    """Search C on two parts of the training images (indices), and fit again to both."""
    if not len(validation):
        raise UserError(f"{data.name}: no class has two training images, so none is left to choose C by")
    x, y = features.trainval, data.trainval.labels
    found = search_probe(
        x[fitted],
        y[fitted],
        x[validation],
        y[validation],
        trials=settings.trials,
        seed=seed,
        device=features.device,
    )
    return Probed(seed, found.C, found.accuracy, found.probe.predict(features.test))


def accuracy_figures(probed: Sequence[Probed], labels: np.ndarray) -> dict[str, Figure]:
    """Means over the probes, in percent."""
    correct = np.mean([run.predicted == labels for run in probed], axis=0)
    return {
        "top-1": _percent(bootstrap_mean(correct)),
        "mean per class": _percent(bootstrap_mean_per_class(correct, labels)),
    }


def _percent(found: Interval) -> Figure:
    return Figure(100 * found.value, 100 * found.low, 100 * found.high)


def prediction_columns(
    test: ImageSet, repeated: Mapping[str, Sequence[Any]], probed: Sequence[Probed]
) -> dict[str, Any]:
    """A row for each probe and test image. `repeated` holds one value for each probe."""
    ids, times = np.array(test.class_ids, object), len(probed)
    predicted = np.concatenate([run.predicted for run in probed])
    labels = np.tile(test.labels, times)
    columns = {name: np.repeat(np.array(values), len(test)) for name, values in repeated.items()}
    return {
        "sample": [test.keys[i] for i in range(len(test))] * times,
        "label": ids[labels],
        "predicted": ids[predicted],
        "correct": predicted == labels,
        **columns,
    }
