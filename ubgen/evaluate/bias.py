"""The three benchmarks of bias (Table 3) under one name each: found, opened for a backbone, evaluated."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ubgen.core.categories import LabelMapping
from ubgen.core.errors import UserError
from ubgen.evaluate import cue_conflict, focus, in9
from ubgen.evaluate.backbone import Backbone
from ubgen.evaluate.classify import mapping_of
from ubgen.evaluate.results import Result


@dataclass(frozen=True)
class Benchmark:
    """Where a benchmark lies, and who reads and evaluates it."""

    layout: str
    """Below the root of all datasets."""
    source: str
    """Where people get it."""
    open: Callable[[Path, LabelMapping], Any]
    evaluate: Callable[..., Result]
    """(backbone, what `open` gave, **how) -> Result."""


BENCHMARKS = {
    cue_conflict.NAME: Benchmark(
        "cue-conflict/<shape>/<shape><number>-<texture><number>.png",
        "https://github.com/rgeirhos/texture-vs-shape (stimuli/style-transfer-preprocessed-512)",
        cue_conflict.open_cue_conflict,
        cue_conflict.cue_conflict,
    ),
    focus.NAME: Benchmark(
        "focus/annotations.db and the images that it names",
        "https://github.com/priyathamkat/focus (focus.zip)",
        focus.open_focus,
        focus.focus,
    ),
    in9.NAME: Benchmark(
        "in9/mixed_same/val/<category>/fg_<foreground>_bg_<background>.JPEG, and the same of in9/mixed_rand",
        "https://github.com/MadryLab/backgrounds_challenge (the data of its release)",
        in9.open_backgrounds,
        in9.backgrounds,
    ),
}


def require_benchmarks(names: Sequence[str], root: Path) -> None:
    """UserError with a line for each one that is not there: the layout, where to get it. Needs no backbone."""
    wrong = [_unknown(name) for name in names if name not in BENCHMARKS]
    wrong += [
        f"{name}: {root / name} is missing{_expected(name)}"
        for name in names
        if name in BENCHMARKS and not (root / name).is_dir()
    ]
    _refuse(wrong)


def open_benchmarks(names: Sequence[str], root: Path, backbone: Backbone) -> Mapping[str, Any]:
    """Lists of images with their labels, for `evaluate`; images are not read.

    UserError with a line for each one that is missing or damaged, or does not fit the backbone's classes.
    """
    require_benchmarks(names, root)
    opened, wrong = {}, []
    for name in names:
        try:
            mapping = mapping_of(name, backbone)
        except UserError as error:
            wrong.append(f"{name}: {error}")
            continue
        try:
            opened[name] = BENCHMARKS[name].open(root / name, mapping)
        except UserError as error:
            wrong.append(f"{name}: {error}{_expected(name)}")
    _refuse(wrong)
    return opened


def _unknown(name: str) -> str:
    return f"{name!r} is no benchmark of bias; choose from {', '.join(BENCHMARKS)}"


def _expected(name: str) -> str:
    return f"; expected {BENCHMARKS[name].layout}; get it from {BENCHMARKS[name].source}"


def _refuse(wrong: Sequence[str]) -> None:
    if len(wrong) == 1:
        raise UserError(wrong[0])
    if wrong:
        raise UserError(
            f"{len(wrong)} benchmarks of bias cannot be used:" + "".join(f"\n  {w}" for w in wrong)
        )
