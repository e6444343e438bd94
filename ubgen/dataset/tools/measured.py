"""Measures of a dataset from features of its images: diversity, near-duplicates, agreement of labels, two meanings."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np

from ubgen.core.errors import UserError, warn
from ubgen.dataset.reader import ShardDataset
from ubgen.dataset.tools.features import Joined
from ubgen.dataset.tools.inspection import bad_images, copies, inspect
from ubgen.measures.agreement import class_means, near_pairs, nearest_class, two_clusters
from ubgen.measures.bias import wilson
from ubgen.measures.compare import compare
from ubgen.measures.spread import spread, within_class_spread

ALL_LIMIT, CLASS_LIMIT, PAIR_LIMIT, NEAR_LIMIT = 200_000, 500, 20_000, 2_000
SEPARATION, SMALLER = 0.8, 0.1
_LISTED = 50
_SHOWN = 8
Report = Callable[[int, int, str], Any]


class Images(Protocol):
    """What an `ImageSet` of `ubgen.loading` gives."""

    @property
    def labels(self) -> np.ndarray: ...
    def __len__(self) -> int: ...
    def read(self, index: int) -> bytes: ...
    def describe(self, index: int) -> str: ...


@dataclass(frozen=True)
class Features:
    """Of all images of a dataset, in order."""

    rows: Any
    """(N, D) numbers, of which slices and sorted rows can be taken."""
    encoder: str
    """Its name, for people."""
    identity: str
    """Of the encoder; empty where nothing says it."""
    is_reward: bool = False
    """Whether the encoder took part in making the images."""


def measure(
    features: Features,
    labels_N: np.ndarray,
    ids: Sequence[str],
    names: Sequence[str],
    *,
    near: float = 0.97,
    seed: int = 0,
    report: Report = lambda done, total, note: None,
) -> dict[str, Any]:
    """The figures as JSON can hold them; intervals are [value, low, high] of 95 %.

    "diversity" (at most 200,000 samples), "agreement" (the same), "near_duplicates" (within each class, 2,000 images of
    it at most; and over all, at most 20,000), "classes" (of each, RKE, Vendi and variance of at most 500, and its
    agreement), and "two_meanings". Each says its number of samples. `near` is the cosine from which images count as
    near-duplicates.
    """
    if len(labels_N) != len(features.rows):
        raise UserError(f"{len(features.rows):,} features, but {len(labels_N):,} labels")
    rng = np.random.default_rng(seed)
    steps = len(names) + 3
    rows, chosen = features.rows, _sample(len(labels_N), ALL_LIMIT, rng)
    some, of_some = rows[chosen], labels_N[chosen]
    diversity = _diversity(some, of_some)
    report(1, steps, "diversity of all")
    predicted = nearest_class(some, of_some, len(names))
    report(2, steps, "label agreement")
    overall = _sample(len(chosen), PAIR_LIMIT, rng)
    over_all = _near(some[overall], chosen[overall], near)
    report(3, steps, "near-duplicates")
    del some
    means = class_means(rows, labels_N, len(names))
    classes, within, meanings = [], _Pairs(), []
    order = np.argsort(labels_N, kind="stable")
    ends = np.cumsum(np.bincount(labels_N, minlength=len(names)))
    for label, name in enumerate(names):
        places = order[ends[label - 1] if label else 0 : ends[label]]
        entry, found = _of_class(rows, places, near, rng)
        within.add(found)
        entry |= {"index": label, "id": ids[label], "name": name}
        entry |= _class_agreement(predicted[of_some == label], label, names)
        classes.append(entry)
        if meaning := _meanings(rows, places, label, means, ids, names, rng):
            meanings.append(meaning)
        report(4 + label, steps, "class by class")
    meanings.sort(key=lambda entry: -entry["separation"])
    return {
        "encoder": features.encoder,
        "encoder_is_the_reward": features.is_reward,
        "images": len(labels_N),
        "diversity": diversity,
        "agreement": _agreement(predicted == of_some),
        "near_duplicates": {"cosine": near, "within_classes": within.entry(), "over_all": over_all},
        "two_meanings": meanings,
        "classes": classes,
    }


def kept_features(dataset: ShardDataset, clip_hash: str = "") -> Features | None:
    """The CLIP features that synthesis kept beside its shards; None unless all shards have them."""
    shards = dataset.shards
    if not shards or any(shard.features is None for shard in shards):
        return None
    parts = [part for shard in shards if (part := shard.read_features()) is not None]
    return Features(Joined(parts), "the CLIP of synthesis", clip_hash, True)


def measured_by_kept_features(dataset: ShardDataset) -> dict[str, Any]:
    """`measure`; nothing, with a warning, where it cannot be done. A finished run is not lost for a figure."""
    try:
        features = kept_features(dataset)
        if features is None or len(dataset) < 2:
            return {}
        ids, names = ([entry[part] for entry in dataset.classes] for part in ("id", "name"))
        return measure(features, dataset.labels(), ids, names)
    except UserError as error:
        warn(f"no measures in the dataset's card: {error}")
        return {}


def require_same_encoder(features: Features, reference: Features) -> None:
    """UserError for features that cannot be compared."""
    if features.identity != reference.identity or features.rows.shape[1] != reference.rows.shape[1]:
        raise UserError(
            f"the dataset's features are by {features.encoder}, the reference's by {reference.encoder}, or by other "
            "weights; make both with the same encoder (ubgen-dataset features)"
        )


def compare_with(
    features: Features, reference: Features, *, seed: int = 0, report: Report = lambda done, total, note: None
) -> dict[str, Any]:
    """`Comparison` as JSON can hold it. UserError for features of different encoders."""
    require_same_encoder(features, reference)
    found = compare(
        features.rows, reference.rows, seed=seed, report=lambda done, total: report(done, total, "reference")
    )
    return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(found).items()}


def inspected(
    images: Images, count: int | None, *, seed: int = 0, report: Report = lambda done, total, note: None
) -> dict[str, Any]:
    """CleanVision's kinds of bad image, and copies, among `count` random images; None: among all.

    "kinds": for each its number of images, share with interval, and the first places; "same_file", "same_pixels" and
    "same_perceptual_hash": groups of places in the dataset. Images of one colour have no perceptual hash that counts.
    """
    total = len(images)
    chosen = _sample(total, total if count is None else count, np.random.default_rng(seed)).tolist()
    looks = inspect(images.read, chosen, images.describe, lambda done, all_: report(done, all_, "images"))
    kinds = {
        kind: {
            "images": len(found),
            "share": [len(found) / len(looks), *_shares(len(found), len(looks))],
            "first": [chosen[i] for i in found[:_LISTED]],
        }
        for kind, found in bad_images(looks).items()
    }
    hashes = [(i, "blank") if one.blank else one.phash for i, one in enumerate(looks)]
    groups = {
        "same_file": copies([one.content for one in looks]),
        "same_pixels": copies([one.pixels for one in looks]),
        "same_perceptual_hash": copies(hashes),
    }
    return {"images": len(looks), "of": total, "kinds": kinds} | {
        name: {
            "images": sum(map(len, found)),
            "groups": [[chosen[i] for i in group[:_SHOWN]] for group in found[:_LISTED]],
        }
        for name, found in groups.items()
    }


# --- the parts


def _sample(total: int, limit: int, rng: np.random.Generator) -> np.ndarray:
    """Sorted places."""
    return np.arange(total) if total <= limit else np.sort(rng.choice(total, limit, replace=False))


def _diversity(rows: Any, labels: np.ndarray) -> dict[str, Any]:
    found = spread(rows)
    return {
        "samples": found.samples,
        "rke": list(found.rke),
        "vendi": list(found.vendi),
        "vendi_grows_with_samples": found.vendi_is_limited_by_samples,
        "within_class_variance": list(within_class_spread(rows, labels)),
    }


def _of_class(
    rows: Any, places: np.ndarray, near: float, rng: np.random.Generator
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    entry: dict[str, Any] = {"images": len(places)}
    if len(places) < 2:
        return entry, None
    own = np.sort(places[_sample(len(places), NEAR_LIMIT, rng)])
    x = rows[own]
    found = spread(x[_sample(len(own), CLASS_LIMIT, rng)])
    pairs = _near(x, own, near)
    figures = {name: list(getattr(found, name)) for name in ("rke", "vendi", "variance")}
    return entry | figures | {"samples": found.samples, "near_duplicates": pairs["images"]}, pairs


def _near(rows: np.ndarray, places: np.ndarray, threshold: float) -> dict[str, Any]:
    near, pairs = near_pairs(rows, threshold, _LISTED)
    listed = [[int(places[i]), int(places[j]), round(cosine, 4)] for i, j, cosine in pairs]
    return {"samples": len(rows), "images": int(near.sum()), "pairs": listed}


class _Pairs:
    """Sums the near-duplicates of the classes."""

    def __init__(self) -> None:
        self._found: dict[str, Any] = {"samples": 0, "images": 0, "pairs": []}

    def add(self, found: Mapping[str, Any] | None) -> None:
        if found is not None:
            for name in ("samples", "images"):
                self._found[name] += found[name]
            self._found["pairs"] += found["pairs"]

    def entry(self) -> dict[str, Any]:
        pairs = sorted(self._found["pairs"], key=lambda pair: -pair[2])[:_LISTED]
        return self._found | {"pairs": pairs}


def _agreement(correct: np.ndarray) -> dict[str, Any]:
    share, count = float(correct.mean()), len(correct)
    return {
        "share": [share, *_shares(int(correct.sum()), count)],
        "samples": count,
        "method": "nearest class mean by cosine, without the image itself",
    }


def _shares(successes: int, count: int) -> tuple[float, float]:
    low, high = wilson(successes, count) or (0.0, 100.0)
    return low / 100, high / 100


def _class_agreement(predicted: np.ndarray, label: int, names: Sequence[str]) -> dict[str, Any]:
    if not len(predicted):
        return {}
    right = int((predicted == label).sum())
    entry: dict[str, Any] = {"agreement": [right / len(predicted), *_shares(right, len(predicted))]}
    others = np.bincount(predicted[predicted != label], minlength=1)
    return entry | ({"mistaken_for": names[int(others.argmax())]} if others.any() else {})


def _meanings(
    rows: Any,
    places: np.ndarray,
    label: int,
    means: np.ndarray,
    ids: Sequence[str],
    names: Sequence[str],
    rng: np.random.Generator,
) -> dict[str, Any] | None:
    """An entry if the class falls into two clusters that lie nearest to two different other classes."""
    if len(names) < 3:
        return None
    own = np.sort(places[_sample(len(places), CLASS_LIMIT, rng)])
    x = np.asarray(rows[own], np.float64)
    found = two_clusters(x)
    if found is None or found.separation < SEPARATION or found.smaller < SMALLER:
        return None
    cosines = found.means @ (means / np.linalg.norm(means, axis=1, keepdims=True)).T
    cosines = np.nan_to_num(cosines, nan=-np.inf)
    cosines[:, label] = -np.inf
    nearest = cosines.argmax(1)
    if nearest[0] == nearest[1]:
        return None
    clusters = []
    for number in range(2):
        inside = found.assigned == bool(number)
        typical = np.argsort(-(x[inside] @ found.means[number]))[:_SHOWN]
        clusters.append(
            {
                "near": names[nearest[number]],
                "share": float(inside.mean()),
                "examples": own[inside][typical].tolist(),
                "prompt_line": f"{ids[label]}\t{names[label]}, similar to {names[nearest[number]]}",
            }
        )
    return {
        "index": label,
        "name": names[label],
        "separation": round(found.separation, 4),
        "samples": len(own),
        "clusters": clusters,
    }
