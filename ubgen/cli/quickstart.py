"""make quickstart: class names in, fine-tuned generator, engine and annotated dataset out, on the miniature family."""

import io
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from PIL import Image
from rich.console import Console

from ubgen.core.classes import load_classes
from ubgen.core.config import load_recipe
from ubgen.core.errors import UserError, run
from ubgen.dataset import encode_image
from ubgen.diffusion import load_stable_diffusion
from ubgen.miniature.measure import WEIGHTS, Judge, generate, stored_images, table
from ubgen.train import TrainConfig

REAL_RUN = """The same with Stable Diffusion 1.5, once its weights lie in a local directory:
  . .venv/bin/activate    # ubgen's commands lie in there
  ubgen-train  --recipe sd15-imagenet1k --out runs/sd15 \\
               --networks.stable-diffusion SD15 --networks.clip CLIP --networks.qalign QALIGN
  ubgen-export --spec sd15-fp16 --lora runs/sd15 --out runs/sd15-engine \\
               --stable-diffusion SD15 --clip CLIP --qalign QALIGN
  ubgen-synth  --engine runs/sd15-engine --device cuda --classes imagenet1k --per-class 1300 --out runs/sd15-dataset"""

# Warm-up and learning rate: 80 updates at the recipe's own rate leave the bias as it was.
SHORTER = ("--discriminator.warmup-updates", "12", "--generator.lr", "2e-4")
SHORTENED = """A shortened run is coarse: at twice the recipe's learning rate the bias falls sooner, at a price that
differs from seed to seed. bench/results/fine-tuning.md has figures of whole ones.
The whole run of {full} updates, and its measures:
  .venv/bin/ubgen-train --recipe miniature --out runs/miniature
  .venv/bin/python -m ubgen.miniature.measure --lora runs/miniature --out runs/miniature-measured
"""


@dataclass(frozen=True)
class Arguments:
    """Run the whole chain on the miniature family, shortened to a few minutes, and compare before and after."""

    out: Path = Path("runs/quickstart")
    """Directory for train/, engine/, dataset/ and report.html."""
    updates: int = 80
    """Fine-tuning updates. The recipe itself has more, at half the learning rate, and a longer warm-up."""
    per_class: int = 20
    """Images per class."""


def stage(console: Console, out: Path, command: list[str]) -> None:
    """Run one ubgen command as the user would type it; where its output is finished, it says so."""
    shown = shlex.join([*command, "--out", str(out)])
    console.print(f"\n[bold]$ {shown}[/]", soft_wrap=True)
    program = Path(sys.executable).parent / command[0]
    if subprocess.run([program, *command[1:], "--out", out]).returncode:
        raise UserError(
            f"{command[0]} failed; what it said stands above. Run `make quickstart` again to continue"
        )


def quickstart(given: Arguments) -> None:
    _check(given)
    console, start = Console(), time.monotonic()
    full = load_recipe("miniature", TrainConfig).max_updates
    console.print(
        f"Quickstart: fine-tuning has {given.updates} updates at twice the miniature recipe's learning rate "
        f"(the recipe has {full} updates)."
    )
    train, engine, dataset = (given.out / name for name in ("train", "engine", "dataset"))
    stage(
        console,
        train,
        ["ubgen-train", "--recipe", "miniature", "--max-updates", str(given.updates), *SHORTER],
    )
    stage(console, engine, ["ubgen-export", "--spec", "miniature", "--lora", str(train)])
    synth = [
        "ubgen-synth",
        "--engine",
        str(engine),
        "--classes",
        "miniature",
        "--per-class",
        str(given.per_class),
    ]
    stage(console, dataset, synth)
    console.print("\nThe base generator on the same classes and the same noise, for comparison:")
    names = load_classes("miniature").names
    base_images, base_names = generate(
        load_stable_diffusion(f"{WEIGHTS}/stable-diffusion"), names, given.per_class, seed=0
    )
    judge = Judge()
    rows = {
        "base generator": judge.measure(_as_stored(base_images), base_names),
        "dataset": judge.measure(*stored_images(dataset)),
    }
    console.print(
        table(rows, f"Before and after {given.updates} updates, {given.per_class} images per class")
    )
    if full and given.updates < full:
        console.print(SHORTENED.format(full=full), highlight=False, soft_wrap=True)
    report = given.out / "report.html"
    stage(console, report, ["ubgen-report", str(train), str(engine), str(dataset)])
    console.print(f"\npictures  {dataset / 'contact-sheet.png'}\nreport    {report}\ndataset   {dataset}")
    console.print(
        f"took      {(time.monotonic() - start) / 60:.1f} minutes\n\n{REAL_RUN}",
        highlight=False,
        soft_wrap=True,
    )


def _as_stored(images_NHW3: np.ndarray) -> np.ndarray:
    """What comes back from a dataset's JPEGs: Q-Align rates the miniature's a little higher than the images."""
    files = (encode_image(image, "jpg") for image in images_NHW3)
    return np.stack([np.asarray(Image.open(io.BytesIO(file))) for file in files])


def _check(given: Arguments) -> None:
    """Before the minutes of training, not after them."""
    for option, value in (("--updates", given.updates), ("--per-class", given.per_class)):
        if value < 1:
            raise UserError(f"{option} must be at least 1, not {value}")


def main() -> None:
    run(lambda: quickstart(tyro.cli(Arguments, prog="quickstart")))


if __name__ == "__main__":
    main()
