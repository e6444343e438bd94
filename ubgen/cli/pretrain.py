"""ubgen-pretrain: train a backbone on a dataset."""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ubgen.core.config import load_recipe
from ubgen.core.errors import UserError, run
from ubgen.pretrain import PretrainConfig, pretrain


@dataclass(frozen=True)
class Arguments:
    """Train a backbone on a dataset with the paper's recipe; the defaults shown are the recipe's.

    Run the same command again to continue an interrupted run; on a finished one it says so and changes nothing.
    """

    config: Annotated[PretrainConfig, tyro.conf.arg(name="")]
    data: str = ""
    """The dataset (required): a directory or URL of ubgen's shards or of WebDataset tars, or an image folder."""
    val: str | None = None
    """A dataset of the same classes to measure accuracy on; classes are matched by id."""
    recipe: str = "resnet50"
    """A shipped recipe (resnet50, vit-s, resnet50-in100, miniature, miniature-vit) or a TOML file."""
    out: Path = Path("runs/backbone")
    """Directory for the results."""
    overwrite: bool = False
    """Start again in a directory that was used before; what the earlier run left there is removed."""
    stop_after: int | None = None
    """Stop after so many updates, with a checkpoint; the same command continues."""


def parse(arguments: list[str]) -> Arguments:
    """Command line -> run: the recipe first, then what overrides it."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--recipe", default="resnet50")
    recipe = first.parse_known_args(arguments)[0].recipe
    default = Arguments(config=load_recipe(recipe, PretrainConfig, "pretrain"), recipe=recipe)
    given = tyro.cli(Arguments, default=default, args=arguments, prog="ubgen-pretrain")
    if not given.data:
        raise UserError("--data is missing: the dataset to train on")
    return given


def train_backbone() -> None:
    given = parse(sys.argv[1:])
    pretrain(
        given.config,
        given.data,
        given.out,
        validation=given.val,
        recipe=given.recipe,
        overwrite=given.overwrite,
        stop_after=given.stop_after,
    )


def main() -> None:
    run(train_backbone)


if __name__ == "__main__":
    main()
