"""ubgen-bench: the speed of what ubgen runs, beside its peers."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro
from rich.console import Console

from ubgen.core.errors import run

if TYPE_CHECKING:
    from ubgen.benchmark.table import Table


def engine(
    engine: Path,
    batch: int | None = None,
    seconds: float = 10.0,
    against: tuple[Literal["eager", "compile"], ...] = ("eager",),
    steps: int = 50,
    guidance: float = 2.0,
    device: str | None = None,
    out: Path | None = None,
) -> None:
    """Time an engine: each network at its best batch, the denoising loop, and the pipeline from noise to scored images.

    The peers run the same weights in the same precision in the same process, in turns with the engine. They need the
    weights at the paths that the engine's manifest names; without those the engine is timed alone.

    Args:
        engine: Directory made by ubgen-export.
        batch: Rows of each network, within what it takes; the batch that it was made for if not given.
        seconds: About how long each part is measured, all sides together. Loops run 3 times at least.
        against: "eager" (PyTorch, and diffusers' own pipeline), "compile" (the same through torch.compile), or both.
        steps: PNDM sampling steps of the loop and the pipeline.
        guidance: Classifier-free guidance scale.
        device: Where to run; by default the device that the engine was made for.
        out: Directory for engine.json and engine.md; without it the table is only shown.
    """
    from ubgen.benchmark import bench_engine

    console = Console()
    with console.status("starting") as status:
        result = bench_engine(
            engine,
            device=device,
            batch=batch,
            seconds=seconds,
            against=against,
            steps=steps,
            guidance=guidance,
            say=status.update,
        )
    _present(console, [result.table()], result.write, out)


def _present(
    console: Console, tables: "Sequence[Table]", write: Callable[[Path], object], out: Path | None
) -> None:
    for table in tables:
        table.show(console)
    if out is not None:
        write(out)
        console.print(f"written to {out}")


def synth(
    engine: Path,
    images: int | None = None,
    batch: int | None = None,
    steps: int = 50,
    guidance: float = 2.0,
    rounds: int = 3,
    against: tuple[Literal["bare", "diffusers"], ...] = ("bare", "diffusers"),
    dataset: int = 1_300_000,
    gpus: int = 1,
    device: str | None = None,
    out: Path | None = None,
) -> None:
    """Time synthesis from noise to scored images on disk, and project how long a whole dataset takes.

    Prints images/s beside the bare loop of the same engines (denoise and decode, results thrown away; once more with
    the scorers) and diffusers' StableDiffusionPipeline, in turns in one process; then the time by stage, and the hours
    for --dataset images.

    Args:
        engine: Directory made by ubgen-export.
        images: Images of each side in each round; by default 8 batches.
        batch: Images at a time; the batch that the engine was made for if not given.
        steps: PNDM sampling steps.
        guidance: Classifier-free guidance scale.
        rounds: How often each side runs, after one round that does not count. Medians are shown.
        against: What to compare with; diffusers needs the weights at the paths that the engine's manifest names.
        dataset: Images of the dataset for the projection.
        gpus: Devices like this one that would make it together.
        device: Where to run; by default the device that the engine was made for.
        out: Directory for synth.json and synth.md; without it the tables are only shown.
    """
    from ubgen.benchmark import bench_synth

    console = Console()
    with console.status("starting") as status:
        result = bench_synth(
            engine,
            images=images,
            batch=batch,
            device=device,
            steps=steps,
            guidance=guidance,
            rounds=rounds,
            against=against,
            dataset=dataset,
            gpus=gpus,
            say=status.update,
        )
    _present(console, result.tables(), result.write, out)


def pretrain(
    data: str,
    image_size: int = 224,
    batch: int = 64,
    batches: int = 20,
    workers: tuple[int, ...] = (1, 2, 4),
    rounds: int = 5,
    gpus: int = 8,
    step_seconds: float = 0.1,
    out: Path | None = None,
) -> None:
    """Time the loaders of pre-training on the CPU: threads and DALI beside timm's create_loader and SPDL.

    All have the same transforms. Prints images/s and CPU time of each, in turns in one process, and the cores that feed
    --gpus GPUs at a given step.

    Args:
        data: Dataset of ubgen, or image folder.
        image_size: Side of the network's input.
        batch: Images of a batch.
        batches: Batches that are timed in each round, after those that were loaded ahead.
        workers: Numbers of threads, or of timm's processes, to try.
        rounds: How often each side runs, after one round that does not count. Medians are shown.
        gpus: GPUs to feed.
        step_seconds: Time in which one GPU takes a batch.
        out: Directory for pretrain-loaders.json and pretrain-loaders.md; without it the tables are only shown.
    """
    from ubgen.benchmark import bench_pretrain

    console = Console()
    with console.status("starting") as status:
        result = bench_pretrain(
            data,
            image_size=image_size,
            batch=batch,
            batches=batches,
            workers=workers,
            rounds=rounds,
            gpus=gpus,
            step_seconds=step_seconds,
            say=status.update,
        )
    _present(console, result.tables(), result.write, out)


def probe(
    samples: int = 15_880,
    dim: int = 2048,
    classes: int = 397,
    trials: int = 30,
    peer_trials: int = 5,
    converged: bool = True,
    seed: int = 0,
    out: Path | None = None,
) -> None:
    """Time the search of a linear probe beside the same search with scikit-learn's LogisticRegression.

    The features are synthetic, like a ResNet's after pooling. scikit-learn fits some of the trials, and its time for
    all is reckoned from these: a whole search of it takes hours at the default size.

    Args:
        samples: Training samples; a quarter as many are for validation, and as many again for the test.
        dim: Length of a feature.
        classes: Number of classes.
        trials: Values of C that the search tries.
        peer_trials: How many of these scikit-learn fits.
        converged: Time scikit-learn also with a tolerance with which it comes close to the optimum.
        seed: Seed of the features.
        out: Directory for probe.json and probe.md; without it the tables are only shown.
    """
    from ubgen.benchmark import bench_probe

    console = Console()
    with console.status("starting") as status:
        result = bench_probe(
            samples=samples,
            dim=dim,
            classes=classes,
            trials=trials,
            peer_trials=peer_trials,
            converged=converged,
            seed=seed,
            say=status.update,
        )
    _present(console, result.tables(), result.write, out)


def main() -> None:
    """Entry point of the `ubgen-bench` command."""
    about = "Measure the speed of what ubgen runs, beside its peers, in one process."
    commands: dict[str, Callable[..., None]] = {
        "engine": engine,
        "synth": synth,
        "pretrain": pretrain,
        "probe": probe,
    }
    run(
        lambda: tyro.extras.subcommand_cli_from_dict(commands, prog="ubgen-bench", description=about),
        resumes=False,
    )


if __name__ == "__main__":
    main()
