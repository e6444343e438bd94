"""Cue conflict (Geirhos et al., 2019): images with the shape of one class and the texture of another.

Layout, as released: <root>/<shape>/<shape><number>-<texture><number>.png, such as airplane/airplane1-bicycle2.png.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Unpack

import numpy as np

from ubgen.core.categories import LabelMapping
from ubgen.core.errors import UserError
from ubgen.evaluate.backbone import Backbone
from ubgen.evaluate.classify import How, figure, fingerprint, images_in, known_classes, warn_of_size
from ubgen.evaluate.extract import extract
from ubgen.evaluate.results import Result
from ubgen.loading.imageset import ImageSet, listed_files
from ubgen.measures.bias import shape_bias

NAME = "cue-conflict"
_FILE = re.compile(r"(?P<shape>.+?)\d*-(?P<texture>[^-]*?)\d*")


@dataclass(frozen=True, eq=False)
class CueConflict:
    """The images whose shape and texture differ."""

    mapping: LabelMapping
    images: ImageSet
    """Labelled by shape."""
    textures: Sequence[str]
    same: int
    """Images whose shape is their texture; they are left out."""

    def fingerprint(self) -> str:
        """Of everything but the content of the images."""
        return fingerprint(self.mapping, self.images, self.textures)


def open_cue_conflict(root: Path, mapping: LabelMapping) -> CueConflict:
    """UserError for a missing or unknown category, and a file with another name. Images are not read."""
    missing = [category.folder for category in mapping.categories if not (root / category.folder).is_dir()]
    if missing:
        raise UserError(
            f"{root} lacks {len(missing)} of {len(mapping.names)} directories, one for each shape: "
            f"{', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''}"
        )
    labels, keys, textures, same = list[int](), list[str](), list[str](), 0
    for number, category in enumerate(mapping.categories):
        for name in images_in(root / category.folder):
            texture = _texture(name, category.name, root / category.folder, mapping)
            if texture == category.name:
                same += 1
                continue
            labels.append(number)
            keys.append(f"{category.folder}/{name}")
            textures.append(texture)
    warn_of_size(root, len(keys) + same, mapping)
    return CueConflict(mapping, listed_files(root, mapping.names, labels, keys), textures, same)


def cue_conflict(
    backbone: Backbone,
    data: CueConflict,
    **how: Unpack[How],
) -> Result:
    """Texture inclination (Table 3).

    Images of the backbone's input size are only normalised; others are resized to it. A category's probability is the
    mean of the softmax over its classes, of all classes of the backbone; the most probable category is the decision.
    """
    transform = backbone.transform()
    logits = extract(backbone, data.images, transform, kind="logits", **how)
    names = np.array(data.mapping.names)
    predicted = names[category_probabilities(logits, data.mapping, known_classes(backbone)).argmax(axis=1)]
    shapes, textures = names[data.images.labels], np.array(data.textures)
    bias = shape_bias(predicted, shapes, textures)
    return Result(
        "bias",
        NAME,
        {"TI": figure(bias.texture_inclination, bias.interval)},
        {
            "images": bias.images,
            "left out, shape is texture": data.same,
            "by shape": bias.shape_correct,
            "by texture": bias.texture_correct,
            "by neither": bias.images - bias.counted,
        },
        {
            "standard error": bias.standard_error,
            "mapping": data.mapping.name,
            "transform": repr(transform),
        },
        {
            "sample": [data.images.keys[i] for i in range(len(data.images))],
            "label": shapes,
            "texture": textures,
            "predicted": predicted,
            "correct": predicted == shapes,
        },
    )


def category_probabilities(
    logits_NK: np.ndarray, mapping: LabelMapping, class_ids: Sequence[str]
) -> np.ndarray:
    """(N, C): the mean, not the sum, of the softmax over each category's classes."""
    numbers = mapping.numbers(class_ids)
    scores = np.exp(logits_NK.astype(np.float64) - logits_NK.max(axis=1, keepdims=True))
    probabilities = scores / scores.sum(axis=1, keepdims=True)
    return np.column_stack([probabilities[:, numbers == n].mean(axis=1) for n in range(len(mapping.names))])


def _texture(name: str, shape: str, directory: Path, mapping: LabelMapping) -> str:
    match = _FILE.fullmatch(Path(name).stem)
    if match is None or not match["shape"].endswith(shape) or match["texture"] not in mapping.names:
        raise UserError(
            f"{directory / name}: expected a name such as {shape}1-{mapping.names[-1]}2.png, of the shape {shape!r} "
            f"and a texture out of {', '.join(mapping.names)}"
        )
    return match["texture"]
