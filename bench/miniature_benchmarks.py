"""How hard the miniature's benchmarks are, and whether its bias benchmarks tell a biased training set from a fair one.

    python -m ubgen.miniature.world --write benchmarks --out runs/benchmarks
    .venv/bin/python bench/miniature_benchmarks.py --data runs/benchmarks

Linear classifiers on raw pixels and on the features of a random, untrained convolutional network.
Writes bench/results/miniature-benchmarks.{json,md}.
"""

import io
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from PIL import Image
from rich.console import Console
from rich.progress import track
from torch import nn

from ubgen.benchmark import Table, machine_record
from ubgen.benchmark.machine import describe
from ubgen.benchmark.table import write_result
from ubgen.core.categories import load_mapping
from ubgen.evaluate.cue_conflict import category_probabilities, open_cue_conflict
from ubgen.evaluate.datasets import open_datasets
from ubgen.evaluate.focus import open_focus
from ubgen.evaluate.in9 import open_backgrounds
from ubgen.loading.imageset import ImageSet, matched, open_image_set
from ubgen.measures.bias import background_gap, context_score, shape_bias
from ubgen.miniature.tasks import TASKS


@dataclass(frozen=True)
class Arguments:
    """How hard the miniature's benchmarks are."""

    data: Path
    """What `python -m ubgen.miniature.world --write benchmarks` wrote."""
    out: Path = Path("bench/results")
    """Directory of the figures."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the random networks."""


def random_network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    layers = [nn.Conv2d(3, 64, 7, 2), nn.ReLU(), nn.Conv2d(64, 256, 5, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(4)]
    return nn.Sequential(*layers, nn.Flatten()).eval()


def pixels(images: ImageSet) -> np.ndarray:
    """uint8 (N, 64, 64, 3)."""
    return np.stack(
        [np.asarray(Image.open(io.BytesIO(images.read(i))).convert("RGB")) for i in range(len(images))]
    )


@torch.no_grad()
def features(network: nn.Module, images_NHW3: np.ndarray) -> np.ndarray:
    batches = torch.from_numpy(images_NHW3).permute(0, 3, 1, 2).split(100)
    return torch.cat([network(batch.float() / 127.5 - 1) for batch in batches]).numpy()


def flat(images_NHW3: np.ndarray) -> np.ndarray:
    return images_NHW3.reshape(len(images_NHW3), -1).astype(np.float32) / 255


def ridge(train: np.ndarray, labels: np.ndarray, *tests: np.ndarray) -> list[np.ndarray]:
    """Scores (N, K) of a ridge regression on the standardised features; penalty 0.3 for each feature, not tuned."""
    mean, scale = train.mean(0), train.std(0) + 1e-6
    train = (train - mean) / scale
    classes = labels.max() + 1
    kernel = train @ train.T + 0.3 * train.shape[1] * np.eye(len(train), dtype=np.float32)
    dual = np.linalg.solve(kernel, np.eye(classes, dtype=np.float32)[labels] - 1 / classes)
    weights = train.T @ dual
    return [((test - mean) / scale) @ weights for test in tests]


def percent(hits: np.ndarray) -> float:
    return 100 * float(hits.mean())


def transfer(arguments: Arguments) -> list[dict[str, Any]]:
    rows = []
    opened = open_datasets([task.name for task in TASKS], arguments.data)
    for name, data in track(opened.items(), "transfer tasks"):
        train, test = pixels(data.trainval), pixels(data.test)
        labels, right = data.trainval.labels, data.test.labels
        (scores,) = ridge(flat(train), labels, flat(test))
        of_seeds = []
        for seed in arguments.seeds:
            network = random_network(seed)
            (found,) = ridge(features(network, train), labels, features(network, test))
            of_seeds.append(percent(found.argmax(1) == right))
        rows.append(
            {
                "task": name,
                "chance": 100 / len(data.test.class_ids),
                "pixels": percent(scores.argmax(1) == right),
                "random network": of_seeds,
            }
        )
    return rows


def bias(arguments: Arguments) -> list[dict[str, Any]]:
    root = arguments.data
    training = {name: open_image_set(root / f"train-{name}") for name in ("fair", "biased")}
    ids = training["fair"].class_ids
    cues = open_cue_conflict(root / "cue-conflict", load_mapping("cue-conflict-miniature"))
    contexts = open_focus(root / "focus", load_mapping("focus-miniature"))
    mixed = open_backgrounds(root / "in9", load_mapping("in9-miniature"))
    validation = [matched(open_image_set(root / f"val-{name}"), training["fair"]) for name in training]
    tests = [pixels(images) for images in (cues.images, contexts.images, mixed.images, *validation)]
    rows: list[dict[str, Any]] = []
    for name, images in training.items():
        train = pixels(images)
        for seed in track(arguments.seeds, f"bias after training on {name}"):
            network = random_network(seed)
            conflict, context, background, *valid = ridge(
                features(network, train), images.labels, *(features(network, test) for test in tests)
            )
            names = np.array(cues.mapping.names)
            decided = names[category_probabilities(conflict, cues.mapping, ids).argmax(1)]
            inclination = shape_bias(decided, names[cues.images.labels], np.array(cues.textures))
            uncommon = contexts.mapping.numbers(ids)[context.argmax(1)] == contexts.images.labels
            right = mixed.mapping.numbers(ids)[background.argmax(1)] == mixed.images.labels
            rows.append(
                {
                    "training": name,
                    "seed": seed,
                    "val-fair": percent(valid[0].argmax(1) == validation[0].labels),
                    "val-biased": percent(valid[1].argmax(1) == validation[1].labels),
                    "texture inclination": inclination.texture_inclination,
                    "CB_avg": context_score(uncommon, contexts.uncommon).cb_avg,
                    "background gap": background_gap(*_paired(right, mixed.variants, mixed.foregrounds)).gap,
                }
            )
    return rows


def _paired(right: np.ndarray, variants: np.ndarray, foregrounds: np.ndarray) -> list[np.ndarray]:
    """Of mixed_same and of mixed_rand, in the same order of foregrounds."""
    return [
        right[variants == name][np.argsort(foregrounds[variants == name])]
        for name in ("mixed_same", "mixed_rand")
    ]


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def tables(tasks: list[dict[str, Any]], biases: list[dict[str, Any]], given: Arguments) -> list[Table]:
    seeds = ", ".join(map(str, given.seeds))
    first = Table(
        "Transfer tasks of the miniature: test accuracy in %",
        ("task", "chance", "raw pixels", "random network"),
        [
            (row["task"], f"{row['chance']:.1f}", f"{row['pixels']:.1f}", spread(row["random network"]))
            for row in tasks
        ],
        text_columns=1,
        note=f"""`python bench/miniature_benchmarks.py`: ridge regression, penalty not tuned, about 1,500 training and
1,000 test images; the sampling error of an accuracy is at most 1.6 points. The random network is untrained: two
convolutions and a 4x4 average pooling; median and range of seeds {seeds}.

{describe(machine_record())}.""",
    )
    measured = [name for name in biases[0] if name not in ("training", "seed")]
    second = Table(
        "Bias of the same classifier, trained on the fair or on the biased world", ("training", *measured)
    )
    second.text_columns = 1
    for training in ("fair", "biased"):
        rows = [row for row in biases if row["training"] == training]
        second.rows.append((training, *(spread([row[name] for row in rows]) for name in measured)))
    second.note = "3,000 training images each. In %, the background gap in points."
    return [first, second]


def main() -> None:
    given = tyro.cli(Arguments)
    tasks, biases = transfer(given), bias(given)
    found = tables(tasks, biases, given)
    write_result(
        given.out,
        "miniature-benchmarks",
        {"machine": machine_record(), "transfer": tasks, "bias": biases},
        found,
    )
    for table in found:
        table.show(Console())


if __name__ == "__main__":
    main()
