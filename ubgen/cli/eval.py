"""ubgen-eval: measure backbones, and compare them."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from ubgen.core.config import load_recipe
from ubgen.core.errors import run
from ubgen.evaluate.dense.settings import DenseRecipe, DenseRun, DetectSettings, SegmentSettings
from ubgen.evaluate.settings import EvalSettings, FewShotSettings, Probing, TransferSettings

Run = Annotated[EvalSettings, tyro.conf.OmitArgPrefixes]
Probe = Annotated[TransferSettings, tyro.conf.OmitArgPrefixes]
FewShot = Annotated[FewShotSettings, tyro.conf.OmitArgPrefixes]
Split = Annotated[Probing, tyro.conf.OmitArgPrefixes]
Dense = Annotated[DenseRun, tyro.conf.OmitArgPrefixes]
Detect = Annotated[DetectSettings, tyro.conf.OmitArgPrefixes]
Segment = Annotated[SegmentSettings, tyro.conf.OmitArgPrefixes]


def transfer(run: Run, probe: Probe, data: Split) -> None:
    """Top-1 accuracy of a linear classifier on frozen features (Table 1): the eight transfer datasets, or others."""
    _evaluate(["transfer"], run, probing=data, transfer_settings=probe)


def fewshot(run: Run, probe: FewShot, data: Split) -> None:
    """The same with a part of the training images (Figure 4), and curves as a picture."""
    _evaluate(["fewshot"], run, probing=data, fewshot_settings=probe)


def bias(run: Run) -> None:
    """Texture inclination on cue conflict, context bias on FOCUS, background gap on IN-9 (Table 3)."""
    _evaluate(["bias"], run)


def val(run: Run) -> None:
    """Accuracy of the backbone's own classifier on a validation set, with raw and averaged weights."""
    _evaluate(["val"], run)


def everything(run: Run, data: Split, seeds: int | None = None, trials: int = 30) -> None:
    """val, transfer, fewshot and bias.

    Args:
        run: Of all of them.
        data: Of transfer and fewshot.
        seeds: Repetitions of transfer and fewshot; 5 and 3 if not given.
        trials: Values of C that are tried in each of their searches.
    """
    options: Any = {"trials": trials} if seeds is None else {"trials": trials, "seeds": seeds}
    probes = {
        "transfer_settings": TransferSettings(**options),
        "fewshot_settings": FewShotSettings(**options),
    }
    _evaluate(["val", "transfer", "fewshot", "bias"], run, probing=data, **probes)


def dense_commands(recipe: str | None) -> dict[str, Callable[..., None]]:
    """Their defaults are the recipe's."""
    default = load_recipe(recipe, DenseRecipe, "dense") if recipe else DenseRecipe()

    def detect(run: Dense, settings: Detect = default.detect, recipe: str | None = recipe) -> None:
        """Mask R-CNN on COCO: box and mask AP (Table 2).

        Args:
            run: What is trained on what.
            settings: Of the training.
            recipe: Where the defaults come from: a shipped recipe (miniature) or a TOML file; the paper's if not given.
        """
        _train(run, settings)

    def segment(run: Dense, settings: Segment = default.segment, recipe: str | None = recipe) -> None:
        """UPerNet on ADE20K: mean intersection over union (Table 2).

        Args:
            run: What is trained on what.
            settings: Of the training.
            recipe: Where the defaults come from: a shipped recipe (miniature) or a TOML file; the paper's if not given.
        """
        _train(run, settings)

    return {"detect": detect, "segment": segment}


def compare(outs: tyro.conf.Positional[tuple[Path, ...]], out: Path | None = None) -> None:
    """Backbones side by side: figures, and differences on the same test images with intervals.

    Args:
        outs: Output directories of ubgen-eval, the one to compare with first; directories of other kinds are refused.
        out: Directory for compare.md and, where there are few-shot results, fewshot.png.
    """
    from ubgen.evaluate.compare import compare as side_by_side
    from ubgen.evaluate.compare import write_comparison

    console = Console()
    grids = side_by_side(outs)
    for grid in grids:
        grid.show(console)
    if out is not None:
        for path in write_comparison(out, outs, grids):
            console.print(str(path), highlight=False, markup=False)


def _evaluate(evaluations: list[str], settings: EvalSettings, **more: Any) -> None:
    settings.check()
    from ubgen.evaluate.plan import evaluate  # with PyTorch, for which --help need not wait
    from ubgen.evaluate.tables import grids

    results = evaluate(evaluations, settings, **more)
    console = Console()
    for grid in grids({settings.out.name: results}):
        grid.show(console)
    console.print(f"{settings.out}: results.json, results.md", highlight=False, markup=False)


def _train(given: DenseRun, settings: DetectSettings | SegmentSettings) -> None:
    given.check()
    from ubgen.evaluate.dense.plan import train_and_measure  # with PyTorch, for which --help need not wait
    from ubgen.evaluate.tables import grids

    results = train_and_measure(given, settings)
    console = Console()
    for grid in grids({given.out.name: results}) if results else []:
        grid.show(console)
    if results:
        console.print(f"{given.out}: results.json, results.md", highlight=False, markup=False)


COMMANDS: dict[str, Callable[..., None]] = {
    "transfer": transfer,
    "fewshot": fewshot,
    "bias": bias,
    "val": val,
    "all": everything,
    "compare": compare,
}


def main() -> None:
    """Entry point of the `ubgen-eval` command."""
    about = "Measure what a backbone has learnt, and compare backbones."

    def parse_and_run() -> None:
        first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        first.add_argument("--recipe")
        commands = {**COMMANDS, **dense_commands(first.parse_known_args()[0].recipe)}
        tyro.extras.subcommand_cli_from_dict(commands, prog="ubgen-eval", description=about)

    run(parse_and_run, resumes=sys.argv[1:2] != ["compare"])


if __name__ == "__main__":
    main()
