"""ubgen-dataset: look at a finished dataset, check it, compare it, and write it in other layouts."""

import json
import math
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from ubgen.cli.dataset_stats import stats
from ubgen.core.console import Report, facts, progress
from ubgen.core.errors import UserError, run
from ubgen.dataset.text import plain, score_titles
from ubgen.dataset.tools import convert as conversion
from ubgen.dataset.tools import diff as comparison
from ubgen.dataset.tools import verify as verification

_DIFFERENT = 1  # exit status of `verify` for a damaged dataset, and of `diff` for different ones


def convert(
    dataset: tyro.conf.Positional[str],
    out: tyro.conf.Positional[str],
    to: conversion.Format,
    shard_size: int | None = None,
    short_side: int | None = None,
) -> None:
    """Write a dataset as image folders, Parquet or new WebDataset shards. Run again, it continues where it stopped.

    Args:
        dataset: Directory or URL of a ubgen dataset, or of WebDataset tars from anywhere.
        out: Directory or URL to write to; empty, or with this conversion, begun or finished.
        to: "folder" (CLASS/KEY.jpg), "parquet" (Hugging Face) or "webdataset" (tars with DALI index).
        shard_size: Images in each part of the output; 1000 if not given.
        short_side: Scale images down to this shorter side, for quicker reading in training; smaller ones stay.
    """
    with _bar("converting", "images") as report:
        images, made = conversion.convert(dataset, out, to, shard_size, report, short_side)
    print(
        f"{images} images in {out}" if made else f"{out} is finished, with {images} images; nothing was done"
    )


def verify(
    dataset: tyro.conf.Positional[str], decode: bool = True, repair: bool = False, workers: int | None = None
) -> None:
    """Read every byte of a dataset: checksums, sidecars, indices, labels, counts, and that each image decodes.

    Exit status 1 when something is damaged.

    Args:
        dataset: Directory or URL of a ubgen dataset.
        decode: Decode every image.
        repair: Delete the manifest and the sidecars of damaged shards, so that ubgen-synth makes these again.
        workers: Threads; one for each core if not given.
    """
    with _bar("verifying", "shards") as report:
        result = verification.verify(dataset, decode=decode, workers=workers, progress=report)
    console = Console()
    console.print(_verified_table(result))
    for problem in result.problems:
        console.print(plain(problem, 400), style="red", highlight=False, markup=False)
    if result.problems:
        deleted = verification.repair(dataset, result) if repair else []
        _fail(_damage(dataset, result, deleted))


def features(
    dataset: tyro.conf.Positional[str],
    out: Path,
    clip: Path | None = None,
    encoder: str | None = None,
    classes: str | None = None,
    cache: Path | None = None,
    batch_size: int = 128,
    device: str = "auto",
) -> None:
    """Features of every image, for `ubgen-dataset stats --features`. Run again, it continues where it stopped.

    Args:
        dataset: A ubgen dataset, an image folder, or WebDataset tars from anywhere.
        out: File to write, .npy; a .json beside it says of which images and by which encoder.
        clip: Directory of a CLIP (open_clip or transformers).
        encoder: Or another network: timm:NAME@FILE, or a directory of ubgen-pretrain.
        classes: Class list of tars that bring none.
        cache: Directory that keeps what is computed, for later runs too; OUT.parts, until OUT is written, if not given.
        batch_size: Images that are computed together.
        device: cpu, cuda or cuda:N; a GPU if there is one.
    """
    from ubgen.evaluate.dataset_features import compute_features  # with torch

    with progress(Console(stderr=True), "features", "images") as report:
        note = compute_features(
            dataset,
            out,
            clip=clip,
            encoder=encoder,
            classes=classes,
            cache=cache,
            batch_size=batch_size,
            device=device,
            report=report,
        )
    print(f"{note.images} x {note.dim} features by {note.encoder} in {out}")


def diff(
    a: tyro.conf.Positional[str],
    b: tyro.conf.Positional[str],
    tolerance_levels: int = 1,
    share: float | None = None,
    out: Path | None = None,
) -> None:
    """Compare two datasets: plan, bytes, samples, labels, prompts, scores and pixels.

    Exit status 1 when they differ; with --share, when they differ by more than that allows.

    Args:
        a: Directory or URL of a ubgen dataset.
        b: Another one.
        tolerance_levels: Largest difference of grey levels (of 255) between pixels that count as near.
        share: Datasets with the same samples, labels and prompts agree if at least this share of the pixels is near.
        out: File for the figures as JSON.
    """
    comparison.check_tolerance(tolerance_levels, share)  # now, not after hours of work
    if out is not None and (out.is_dir() or not out.parent.is_dir()):
        raise UserError(f"--out {out}: expected a file to write, in a directory that exists")
    with _bar("comparing", "samples") as report:
        result = comparison.diff(a, b, levels=tolerance_levels, progress=report)
    agrees = result.agrees(share)
    console = Console()
    console.print(_diff_table(result))
    for example in result.examples:
        console.print(plain(example), highlight=False, markup=False)
    if out is not None:
        out.write_text(json.dumps({**result.to_dict(), "agrees": agrees}, indent=1) + "\n", encoding="utf-8")
    if not agrees:
        _fail(f"{a} and {b} differ")
    print("the same bytes" if result.same_bytes else "the same within the tolerance")


def audit(
    dataset: tyro.conf.Positional[str],
    engine: Path | None = None,
    sample: int = 64,
    seed: int = 0,
    device: str | None = None,
) -> None:
    """Render random samples again from their identities, and compare them with what is stored.

    Exit status 1 when an image has less than 99.9 % of its values within one grey level of what it should be. Images
    that nvjpeg encoded, as it does by default for an engine on a GPU, need a GPU here too.

    Args:
        dataset: Directory or URL of a finished ubgen dataset.
        engine: Directory made by ubgen-export; the one that made the dataset if not given.
        sample: Number of images.
        seed: Chooses the images.
        device: Where to run the engine; the device that it was made for if not given.
    """
    from ubgen.synth.audit import audit as render_again  # with torch; the other commands do without

    with _bar("rendering again", "samples") as report:
        result = render_again(dataset, engine, sample, seed, device, report)
    rows = {
        "samples": f"{result.samples:,}",
        "of the same bytes": f"{result.same_bytes:,}",
        "values within one grey level": f"{result.within:.4%}",
        "largest difference": f"{result.largest} grey levels",
        "engine": "the one that made it" if result.same_engine else "another one",
    }
    Console().print(facts(plain(dataset), rows))
    if not result.passed:
        others = f" and {len(result.differing) - 1} more" if result.differing[1:] else ""
        _fail(f"{dataset}: sample {result.differing[0]}{others} cannot be rendered again")


COMMANDS: dict[str, Callable[..., None]] = {
    "convert": convert,
    "verify": verify,
    "stats": stats,
    "features": features,
    "diff": diff,
    "audit": audit,
}


def _bar(title: str, unit: str) -> AbstractContextManager[Report]:
    return progress(Console(stderr=True), title, unit, log=False)


def _verified_table(result: verification.Verified) -> Table:
    counts = result.class_counts
    return facts(
        plain(result.where),
        {
            "shards": f"{result.shards:,}",
            "images": f"{result.images:,}" + (" (all decoded)" if result.decoded else " (not decoded)"),
            "bytes": f"{result.bytes:,}",
            "classes": f"{len(counts):,}",
            "images per class": f"{min(counts, default=0):,} to {max(counts, default=0):,}",
            "rejections": f"{result.rejected:,}",
            "damaged shards": f"{len(result.damaged):,}",
            "problems": f"{len(result.problems):,}",
        },
    )


def _damage(dataset: str, result: verification.Verified, deleted: list[str]) -> str:
    shards = result.damaged
    if not shards:
        return f"{dataset}: {result.problems[0]}"
    named = f"{dataset}: shard {shards[0]}" + (f" and {len(shards) - 1} more are" if shards[1:] else " is")
    if deleted:
        return f"{named} damaged; {len(deleted)} files deleted, now run the same ubgen-synth command again"
    return f"{named} damaged; the same ubgen-synth command rebuilds what verify --repair takes away"


def _diff_table(result: comparison.Difference) -> Table:
    psnr = "infinite" if math.isinf(result.psnr) else f"{result.psnr:.2f} dB"
    return facts(
        "differences",
        {
            "plan": ", ".join(result.plan) or "the same",
            "bytes": "the same" if result.same_bytes else "different",
            "samples in both": f"{result.samples:,}",
            "only in the first, second": f"{result.only_a:,}, {result.only_b:,}",
            "other label, prompt, flag": f"{result.labels:,}, {result.prompts:,}, {result.flags:,}",
            **{
                f"largest difference of {score_titles(n)[0]}": f"{gap:.3g}"
                for n, gap in result.scores.items()
            },
            "images of other bytes": f"{result.images:,} ({result.sizes:,} of another size)",
            f"pixels within {result.levels} grey levels": f"{result.share:.6%} (worst image {result.lowest_share:.4%})",
            "largest difference": f"{result.largest} grey levels",
            "PSNR": psnr,
        },
    )


def _fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(_DIFFERENT)


def main() -> None:
    """Entry point of the `ubgen-dataset` command."""
    about = "Look at a dataset, check it, compare it, and write it in other layouts."
    run(
        lambda: tyro.extras.subcommand_cli_from_dict(COMMANDS, prog="ubgen-dataset", description=about),
        resumes=sys.argv[1:2] in (["convert"], ["features"]),
    )


if __name__ == "__main__":
    main()
