"""ubgen-dataset stats: counts and scores of a dataset, and measures from its images' features."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

from ubgen.core.console import facts, progress, table
from ubgen.core.errors import UserError
from ubgen.core.stage import read_manifest
from ubgen.dataset import open_dataset, open_store
from ubgen.dataset.card import CLASSES, read_classes
from ubgen.dataset.reader import existing
from ubgen.dataset.text import interval_text, measure_rows, plain, score_titles
from ubgen.dataset.tools.pictures import DEFAULT_SHEETS, write_pictures
from ubgen.dataset.tools.stats import dataset_stats

_WORST = 10  # classes that are listed


@dataclass(frozen=True)
class Measured:
    """What is measured beside the scores; each part takes time only where it is asked for."""

    features: Path | None = None
    """File of ubgen-dataset features; the CLIP features that synthesis kept if not given."""
    measures: bool = False
    """Diversity, near-duplicates, label agreement and classes of two meanings, from the features."""
    reference: str | None = None
    """Another dataset, image folder or directory of tars to compare with: distances, precision, recall and others."""
    reference_features: Path | None = None
    """Features of the reference, by the same encoder; those that synthesis kept if not given."""
    images: int | Literal["all"] = 0
    """How many random images to look at for bad ones and for copies, or "all"."""
    near: float = 0.97
    """Cosine of two images' features from which they count as near-duplicates."""
    seed: int = 0
    """Chooses the samples where not all are used."""


def stats(
    dataset: tyro.conf.Positional[str],
    out: str | None = None,
    sheets: int | Literal["all"] = DEFAULT_SHEETS,
    measured: tyro.conf.OmitArgPrefixes[Measured] = Measured(),
) -> None:
    """Counts, rejections, scores; with --measures, --images or --reference, what is in the images.

    Args:
        dataset: A ubgen dataset (an unfinished one is read as far as it got), an image folder, or WebDataset tars.
        out: Directory or URL for stats.json, contact sheets, histograms, and pictures of what was found.
        sheets: Classes that get a contact sheet of their own there: those with the lowest mean score, or "all".
    """
    if sheets != "all" and sheets < 0:
        raise UserError(f"--sheets must be at least 0, or all, not {sheets}")
    _check(measured)
    console = Console()
    opened = open_dataset(dataset, partial=True) if _is_ours(dataset) else None
    result: dict[str, Any] = {}
    if opened is not None:
        result = dataset_stats(opened)
        console.print(_stats_table(dataset, result))
    images, names = None, []
    if _wants(measured) or opened is None:
        from ubgen.loading.imageset import open_image_set

        images = open_image_set(dataset)
        names = _names(images)
        if opened is None:
            result = {"images": len(images), "class_counts": images.counts().tolist()}
            counts = result["class_counts"]
            sizes = f"{len(counts):,}, with {min(counts):,} to {max(counts):,} images"
            rows = {"images": f"{len(images):,}", "classes": sizes}
            console.print(facts(plain(dataset), rows))
        result |= _measured(images, names, measured, console)
    if out is None:
        return
    store = open_store(out)
    if store.local_path:
        store.local_path.mkdir(parents=True, exist_ok=True)
    store.write("stats.json", json.dumps(result, indent=1) + "\n")
    pictures = []
    if opened is not None:
        pictures = write_pictures(opened, store, stats=result, sheets=None if sheets == "all" else sheets)
    if images is not None:
        from ubgen.dataset.tools.evidence import write_evidence

        pictures += write_evidence(store, images, names, result)
    console.print(f"stats.json and {len(pictures)} pictures in {out}", highlight=False, markup=False)


def _check(measured: Measured) -> None:
    if measured.images != "all" and measured.images < 0:
        raise UserError(f"--images must be at least 0, or all, not {measured.images}")
    if not 0 < measured.near <= 1:
        raise UserError(f"--near must be above 0 and at most 1, not {measured.near}")
    if measured.reference_features is not None and measured.reference is None:
        raise UserError("--reference-features needs --reference, the dataset that they are of")


def _wants(measured: Measured) -> bool:
    return bool(measured.measures or measured.features or measured.reference or measured.images)


def _is_ours(dataset: str) -> bool:
    """Whether `open_dataset` is to read it, or to say what is wrong with it."""
    store = existing(dataset)
    return not store.entries() or any(
        name.startswith("shard-") and name.endswith(".json") for name in store.names()
    )


def _names(images: Any) -> list[str]:
    """Of the classes, for people."""
    if images.store.size(CLASSES) is not None:
        entries = read_classes(images.store)
        if [entry["id"] for entry in entries] == list(images.class_ids):
            return [entry["name"] for entry in entries]
    return list(images.class_ids)


def _measured(images: Any, names: list[str], wanted: Measured, console: Console) -> dict[str, Any]:
    from ubgen.dataset.tools.measured import compare_with, inspected, measure, require_same_encoder

    result: dict[str, Any] = {}
    bar = Console(stderr=True)
    if wanted.measures or wanted.features or wanted.reference:
        features = _features(images, wanted.features, "--features")
        other = None
        if wanted.reference:
            from ubgen.loading.imageset import open_image_set

            reference = open_image_set(wanted.reference)
            other = _features(reference, wanted.reference_features, "--reference-features")
            require_same_encoder(features, other)  # now, not after minutes of work
        with progress(bar, "measuring", "steps", log=False) as report:
            result["measures"] = measure(
                features,
                images.labels,
                images.class_ids,
                names,
                near=wanted.near,
                seed=wanted.seed,
                report=report,
            )
        _print_measures(console, result["measures"])
        if other is not None:
            with progress(bar, "comparing", "steps", log=False) as report:
                found = compare_with(features, other, seed=wanted.seed, report=report)
            result["reference"] = {"dataset": wanted.reference, **found}
            console.print(_reference_table(str(wanted.reference), result["reference"]))
    if wanted.images:
        count = None if wanted.images == "all" else wanted.images
        with progress(bar, "looking", "images", log=False) as report:
            result["inspection"] = inspected(images, count, seed=wanted.seed, report=report)
        console.print(_inspection_table(result["inspection"]))
    return result


def _features(images: Any, file: Path | None, option: str) -> Any:
    """Of a file that fits the images, or those that synthesis kept."""
    from ubgen.dataset.tools.features import read_features
    from ubgen.dataset.tools.measured import Features, kept_features

    reward = _reward(images)
    if file is not None:
        rows, note = read_features(file)
        note.require(file, images.fingerprint(), len(images), images.store)
        return Features(rows, note.encoder, note.identity, bool(reward) and note.identity == reward)
    if images.kind == "shards" and (kept := kept_features(open_dataset(images.store), reward)) is not None:
        return kept
    raise UserError(
        f"{images.store} has no features; run ubgen-dataset features {images.store} --clip DIR --out FILE.npy, and "
        f"give {option} FILE.npy"
    )


def _reward(images: Any) -> str:
    """The hash of the CLIP that synthesis used."""
    if images.kind != "shards":
        return ""
    about = read_manifest(images.store).get("features")
    return str(about.get("clip_hash", "")) if isinstance(about, dict) else ""


# --- tables


def _stats_table(dataset: str, result: Mapping[str, Any]) -> Table:
    counts = result["class_counts"]
    rejected = ", ".join(f"{plain(reason, 60)} {count:,}" for reason, count in result["rejected"].items())
    rows = {
        "images": f"{result['images']:,}",
        "classes": f"{len(counts):,}, with {min(counts, default=0):,} to {max(counts, default=0):,} images",
        "kept with a flag": f"{result['flagged']:,}",
        "rejected": rejected or "0",
    }
    for name in result["scores"]:
        score = result[name]
        if score["count"]:
            spread = f"{score['mean']:.4f} ± {score['std']:.4f}"
            range_ = f"5 % {score['quantiles']['0.05']:.4f}, 95 % {score['quantiles']['0.95']:.4f}"
            rows[score_titles(name)[0]] = f"{spread} ({range_}; {score['min']:.4f} to {score['max']:.4f})"
    return facts(plain(dataset), rows)


def _print_measures(console: Console, result: Mapping[str, Any]) -> None:
    console.print(facts(f"measures, from features by {plain(result['encoder'], 80)}", measure_rows(result)))
    classes = [entry for entry in result["classes"] if "rke" in entry and "agreement" in entry]
    worst = sorted(classes, key=lambda entry: entry["agreement"][0])[:_WORST]
    columns = [
        "lowest agreement",
        "mistaken for",
        "images",
        "agreement",
        "RKE",
        "near-duplicates",
    ]
    rows = [
        [
            plain(entry["name"], 40),
            plain(entry.get("mistaken_for", ""), 40),
            f"{entry['images']:,}",
            f"{entry['agreement'][0]:.1%}",
            f"{entry['rke'][0]:.2f}",
            f"{entry['near_duplicates']:,}",
        ]
        for entry in worst
    ]
    console.print(table("", columns, rows, text_columns=2))
    for entry in result["two_meanings"][:_WORST]:
        near = " and ".join(f"{plain(c['near'], 40)} ({c['share']:.0%})" for c in entry["clusters"])
        console.print(
            f"two meanings? {plain(entry['name'], 40)}: near {near}. Lines for --prompts, of which to keep one:",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
        for cluster in entry["clusters"]:
            class_id, _, prompt = cluster["prompt_line"].partition("\t")
            print(f"{plain(class_id)}\t{plain(prompt)}")  # rich would make spaces of the tab


def _reference_table(reference: str, found: Mapping[str, Any]) -> Table:
    samples = f"{found['samples']:,} of each"
    rows = {
        "Frechet distance": f"{interval_text(found['frechet'], '.4f')} ({found['frechet_samples']:,} of each)",
        "KID": interval_text(found["kid"], ".6f"),
        **{
            name: interval_text(found[name], ".3f") for name in ("precision", "recall", "density", "coverage")
        },
        "told apart by a linear probe": f"{interval_text(found['probe_accuracy'], '.1%')} (chance 50 %; "
        f"{found['probe_samples']:,} of each)",
    }
    return facts(f"against {plain(reference)}, {samples}", rows)


def _inspection_table(found: Mapping[str, Any]) -> Table:
    rows = {
        kind.replace("_", " "): f"{entry['images']:,} ({interval_text(entry['share'], '.2%')})"
        for kind, entry in found["kinds"].items()
    }
    for name in ("same_file", "same_pixels", "same_perceptual_hash"):
        rows[name.replace("_", " ")] = f"{found[name]['images']:,} images"
    return facts(f"bad images and copies, among {found['images']:,} of {found['of']:,} images", rows)
