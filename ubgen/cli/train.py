"""ubgen-train: fine-tune the generator."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from ubgen.core.classes import load_classes
from ubgen.core.config import load_recipe
from ubgen.core.errors import UserError, run
from ubgen.train import TrainConfig, train, validate

if TYPE_CHECKING:
    import numpy as np

    from ubgen.miniature.measure import Judge


@dataclass(frozen=True)
class Arguments:
    """Fine-tune the generator with the paper's losses; the defaults shown are the recipe's.

    Run the same command again to continue an interrupted run; on a finished one it says so and changes nothing.
    """

    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    recipe: str = "miniature"
    """A shipped recipe (miniature, sd15-imagenet1k) or a TOML file."""
    out: Path = Path("runs/train")
    """Directory for the results."""
    overwrite: bool = False
    """Start again in a directory that was used before; what the earlier run left there is removed."""
    stop_after: int | None = None
    """Stop after so many updates, with a checkpoint; the same command continues."""
    dry_run: bool = False
    """Show what a GPU would need, memory by part and time by counted FLOPs, and do nothing. Reads configs alone."""


REPLACED = {"epochs": "max_updates", "discriminator.warmup_epochs": "discriminator.warmup_updates"}
"""A length in epochs, and the one in updates that counts where both are set."""


def parse(arguments: list[str]) -> Arguments:
    """Command line -> run: the recipe first, then what overrides it."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--recipe", default="miniature")
    recipe = first.parse_known_args(arguments)[0].recipe
    default = Arguments(config=load_recipe(recipe, TrainConfig), recipe=recipe)
    given = tyro.cli(Arguments, default=default, args=arguments, prog="ubgen-train")
    options = {argument.partition("=")[0].replace("-", "_") for argument in arguments}
    for epochs, updates in REPLACED.items():
        if f"__{epochs}" in options and attrgetter(updates)(given.config) is not None:
            by = f"--{updates.replace('_', '-')}"
            raise UserError(f"--{epochs.replace('_', '-')} is replaced by {by} of the recipe; add {by} None")
    return given


def oracle(config: TrainConfig) -> Callable[["np.ndarray", Sequence[str]], dict[str, float]] | None:
    """What knows the world of the miniature's images, where the run is the miniature's."""
    if config.classes != "miniature" or not config.networks.stable_diffusion.startswith("ubgen:miniature/"):
        return None

    @cache
    def networks() -> "Judge":
        from ubgen.miniature.measure import Judge

        return Judge()

    def judge(images_BHW3: "np.ndarray", names: Sequence[str]) -> dict[str, float]:
        measures = asdict(networks().measure(images_BHW3, names))
        del measures["images"], measures["mutual_information"]  # of so few images it is mostly chance
        return measures

    return judge


def fine_tune() -> None:
    given = parse(sys.argv[1:])
    if given.dry_run:
        return show_plan(given.config)
    train(
        given.config,
        given.out,
        overwrite=given.overwrite,
        stop_after=given.stop_after,
        judge=oracle(given.config),
    )


def show_plan(config: TrainConfig) -> None:
    validate(config)
    classes = load_classes(config.classes)
    from rich.console import Console

    from ubgen.benchmark.finetune import plan_tables, plan_training

    for drawn in plan_tables(plan_training(config, len(classes), int(os.environ.get("WORLD_SIZE", "1")))):
        Console().print(drawn)


def main() -> None:
    run(fine_tune)


if __name__ == "__main__":
    main()
