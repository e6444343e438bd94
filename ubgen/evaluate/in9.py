"""ImageNet-9 of the backgrounds challenge (Xiao et al., 2020): foregrounds on backgrounds of the same or another class.

Layout, as released: <root>/<variant>/val/<category>/fg_<foreground>_bg_<background>.JPEG, where <foreground> is the
ImageNet image that was cut out (class and number, such as n02085620_16757). Names of mixed_rand's backgrounds are those
of another variant, so nothing here reads them.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Unpack

import numpy as np

from ubgen.core.categories import LabelMapping
from ubgen.core.errors import UserError, warn
from ubgen.evaluate.backbone import Backbone
from ubgen.evaluate.classify import (
    How,
    accuracy,
    figure,
    fingerprint,
    images_in,
    known_classes,
    most_likely,
    warn_of_size,
)
from ubgen.evaluate.extract import extract
from ubgen.evaluate.results import Result
from ubgen.loading.imageset import ImageSet, listed_files
from ubgen.measures.bias import background_gap

NAME = "in9"
VARIANTS = ("mixed_same", "mixed_rand")
_FOREGROUND = re.compile(r"fg_(.+?)_bg_.+")


@dataclass(frozen=True, eq=False)
class Backgrounds:
    """Both variants together."""

    mapping: LabelMapping
    images: ImageSet
    """Labelled by category."""
    variants: np.ndarray
    """(N,) text, out of VARIANTS."""
    foregrounds: np.ndarray
    """(N,) text."""
    paired: bool
    """Whether each foreground is in each variant once."""

    def fingerprint(self) -> str:
        """Of everything but the content of the images."""
        return fingerprint(self.mapping, self.images, self.foregrounds)


def open_backgrounds(root: Path, mapping: LabelMapping) -> Backgrounds:
    """UserError for a missing directory. Images are not read."""
    directories = [f"{v}/val/{category.folder}" for v in VARIANTS for category in mapping.categories]
    missing = [name for name in directories if not (root / name).is_dir()]
    if missing:
        raise UserError(
            f"{root} lacks {len(missing)} of {len(directories)} directories, the first is {missing[0]}/"
        )
    rows = [
        (variant, number, f"{variant}/val/{category.folder}/{name}")
        for variant in VARIANTS
        for number, category in enumerate(mapping.categories)
        for name in images_in(root / variant / "val" / category.folder)
    ]
    variants, labels, keys = (list(column) for column in zip(*rows, strict=True))
    foregrounds = np.array([foreground_of(key) for key in keys])
    of = {variant: foregrounds[np.array(variants) == variant] for variant in VARIANTS}
    same, rand = (np.sort(of[variant]) for variant in VARIANTS)
    paired = np.array_equal(same, rand) and len(np.unique(same)) == len(same)
    if not paired:
        shared = len(np.intersect1d(same, rand))
        warn(
            f"{root}: by their names, only {shared:,} foregrounds are in both of mixed_same ({len(same):,} images) and "
            f"mixed_rand ({len(rand):,}), or some are there twice; the gap's interval is that of unpaired images"
        )
    for variant in VARIANTS:
        warn_of_size(root / variant, len(of[variant]), mapping)
    images = listed_files(root, mapping.names, labels, keys)
    return Backgrounds(mapping, images, np.array(variants), foregrounds, paired)


def foreground_of(key: str) -> str:
    """What the name of an image says was cut out; the whole name where it is not of the released form."""
    stem = Path(key).stem
    match = _FOREGROUND.fullmatch(stem)
    return match[1] if match else stem


def backgrounds(
    backbone: Backbone,
    data: Backgrounds,
    *,
    seed: int = 0,
    **how: Unpack[How],
) -> Result:
    """Background gap (Table 3), and the accuracy on both variants.

    Images of the backbone's input size are only normalised, with the backbone's own mean and deviation; others are
    resized to it. The largest of all logits is the decision; a class in none of the nine categories is wrong.
    """
    transform = backbone.transform()
    logits = extract(backbone, data.images, transform, kind="logits", **how)
    decided = most_likely(logits, data.mapping, known_classes(backbone))
    labels = np.array(data.mapping.names)[data.images.labels]
    correct = decided["predicted"] == labels
    order = np.argsort(data.foregrounds, kind="stable")
    same, rand = (correct[order][data.variants[order] == variant] for variant in VARIANTS)
    gap = background_gap(same, rand, paired=data.paired, seed=seed)
    return Result(
        "bias",
        NAME,
        {
            "gap": figure(gap.gap, gap.interval, "points"),
            **{variant: accuracy(each) for variant, each in zip(VARIANTS, (same, rand), strict=True)},
        },
        {variant: len(each) for variant, each in zip(VARIANTS, (same, rand), strict=True)},
        {
            "standard error": gap.standard_error,
            "paired by foreground": data.paired,
            "mapping": data.mapping.name,
            "transform": repr(transform),
        },
        {
            "sample": [data.images.keys[i] for i in range(len(data.images))],
            "label": labels,
            **decided,
            "correct": correct,
            "variant": data.variants,
            "foreground": data.foregrounds,
        },
    )
