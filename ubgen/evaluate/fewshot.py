"""Few-shot transfer (paper, Figure 4): the same probe, trained on a share of the training images."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ubgen.core.console import Report
from ubgen.evaluate.backbone import Backbone
from ubgen.evaluate.datasets import VALIDATION_SHARE, TransferData
from ubgen.evaluate.results import Result
from ubgen.evaluate.settings import FewShotSettings
from ubgen.evaluate.transfer import Features, Probed, Steps, accuracy_figures, prediction_columns, probe
from ubgen.measures.splits import few_shot_subset, stratified_validation


def fewshot(
    backbone: Backbone,
    data: TransferData,
    settings: FewShotSettings,
    *,
    cache: Path | None = None,
    report: Report,
    **extraction: Any,
) -> Result:
    """Top-1 on all test images, for each fraction of train+val: means over seeds, with intervals as in `transfer`.

    The paper gives neither fractions nor seeds. For each seed and fraction, a class-stratified subset of train+val is
    drawn; C is searched with 20 % of each class of the subset as validation images, whatever `data` says of them; the
    probe is fitted again to the whole subset. For one seed, a smaller subset is part of a larger one.
    """
    steps = Steps(data, settings.seeds * len(settings.fractions), report)
    features = Features.of(backbone, data, cache, steps, extraction)
    runs: dict[float, list[Probed]] = {}
    counts = {"classes": len(data.trainval.class_ids), "test": len(data.test)}
    splits = data.file_lists()
    for fraction in settings.fractions:
        runs[fraction] = []
        for seed in settings.all_seeds:
            done = sum(map(len, runs.values()))
            steps.probe(done, f"{percent(fraction)} of the training images, seed {seed}")
            subset = few_shot_subset(data.trainval.labels, fraction, seed)
            runs[fraction].append(_probe_of_subset(features, data, subset, settings, seed))
            counts[f"training images at {percent(fraction)}"] = len(subset)
            if len(subset) < len(data.trainval):
                splits[f"{percent(fraction)}, seed {seed}"] = [splits["trainval"][i] for i in subset]
    steps.probe(settings.seeds * len(settings.fractions), "")
    return _result(data, settings, runs, counts, splits)


def percent(fraction: float) -> str:
    """ "20 %"."""
    return f"{100 * fraction:g} %"


def _probe_of_subset(
    features: Features, data: TransferData, subset: np.ndarray, settings: FewShotSettings, seed: int
) -> Probed:
    chosen = stratified_validation(data.trainval.labels[subset], VALIDATION_SHARE, seed)
    return probe(features, data, np.delete(subset, chosen), subset[chosen], settings, seed)


def _result(
    data: TransferData,
    settings: FewShotSettings,
    runs: dict[float, list[Probed]],
    counts: dict[str, int],
    splits: dict[str, list[str]],
) -> Result:
    labels = data.test.labels
    figures = {
        f"top-1 at {percent(fraction)}": accuracy_figures(probed, labels)["top-1"]
        for fraction, probed in runs.items()
    }
    each = [(fraction, run) for fraction, probed in runs.items() for run in probed]
    described = [{"fraction": fraction, **run.describe(labels)} for fraction, run in each]
    columns: dict[str, list[Any]] = {
        "fraction": [fraction for fraction, _ in each],
        "seed": [run.seed for _, run in each],
    }
    return Result(
        "fewshot",
        data.name,
        figures=figures,
        counts=counts,
        details={"runs": described, "settings": asdict(settings)},
        predictions=prediction_columns(data.test, columns, [run for _, run in each]),
        splits=splits,
    )
