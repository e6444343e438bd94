"""What one evaluation yields, and the files that keep it: figures as JSON, predictions sample by sample as Parquet."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from ubgen.core.errors import UserError, first_line
from ubgen.core.files import atomic_write, replacing

FIGURES, PREDICTIONS, SPLITS = "figures", "predictions", "splits"  # directories of an evaluation's output
WITHOUT_PREDICTIONS = ("detect", "segment")  # evaluations whose figures are no means over images


@dataclass(frozen=True)
class Figure:
    """A measured number. `value` None: undefined, such as the accuracy of a partition without an image."""

    value: float | None
    low: float | None = None
    """Lower end of the 95 % interval, where there is one."""
    high: float | None = None
    unit: str = "%"

    def text(self) -> str:
        """ "71.3 (70.1 to 72.4)", or "undefined"."""
        if self.value is None:
            return "undefined"
        interval = "" if self.low is None or self.high is None else f" ({self.low:.1f} to {self.high:.1f})"
        return f"{self.value:.1f}{interval}"


@dataclass(frozen=True)
class Result:
    """One evaluation of one backbone on one dataset."""

    evaluation: str
    """ "transfer", "fewshot", "bias", "val", "detect" or "segment"."""
    dataset: str
    """Its short name, such as "aircraft" or "cue-conflict"."""
    figures: Mapping[str, Figure]
    """The first one is the figure that tables show."""
    counts: Mapping[str, int] = field(default_factory=dict)
    """Images, classes, and what else is counted."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """What explains the figures, as JSON: chosen settings, figures of each seed."""
    predictions: Mapping[str, Sequence[Any] | np.ndarray] = field(default_factory=dict)
    """Columns of equal length, one row for each test sample (and seed): at least "sample", "label", "predicted" and
    "correct"."""
    splits: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """The files of each part of the dataset, where the evaluation drew them."""

    @property
    def name(self) -> str:
        """Its files' name, such as "transfer-aircraft"."""
        return file_name(self.evaluation, self.dataset)

    @property
    def main(self) -> Figure:
        return next(iter(self.figures.values()))


def file_name(evaluation: str, dataset: str) -> str:
    return f"{evaluation}-{dataset}"


def save(out: Path, result: Result, identity: Mapping[str, Any]) -> None:
    """Write a result's files; the JSON comes last, and marks the result as finished."""
    for directory in (PREDICTIONS, SPLITS, FIGURES):
        (out / directory).mkdir(parents=True, exist_ok=True)
    if result.predictions:
        with replacing(out / PREDICTIONS / f"{result.name}.parquet") as file:
            pyarrow.parquet.write_table(pyarrow.table(dict(result.predictions)), file)
    if result.splits:
        atomic_write(out / SPLITS / f"{result.name}.json", json.dumps(result.splits, indent=0) + "\n")
    values = {"identity": identity, **describe(result)}
    atomic_write(out / FIGURES / f"{result.name}.json", json.dumps(values, indent=1, default=_plain) + "\n")


def describe(result: Result) -> dict[str, Any]:
    """A result as JSON, without predictions and splits."""
    parts = ("evaluation", "dataset", "counts", "details")
    figures = {name: asdict(figure) for name, figure in result.figures.items()}
    return {**{name: getattr(result, name) for name in parts}, "figures": figures}


def _plain(value: Any) -> Any:
    """NumPy's numbers and arrays for JSON."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} in a result is not JSON")


def stored(out: Path, name: str) -> tuple[Result, dict[str, Any]] | None:
    """A finished result without its predictions, and its identity; None if there is none.

    UserError for a damaged file.
    """
    path = out / FIGURES / f"{name}.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        figures = {key: Figure(**figure) for key, figure in values["figures"].items()}
        parts = {key: values[key] for key in ("evaluation", "dataset", "counts", "details")}
        return Result(figures=figures, **parts), values["identity"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{path} is damaged; delete it, and the same command computes it again") from None


def all_stored(out: Path) -> list[Result]:
    """Every finished result of an output directory, by name. UserError where there is none."""
    names = sorted(path.stem for path in (out / FIGURES).glob("*.json") if not path.name.startswith("."))
    found = [result[0] for name in names if (result := stored(out, name))]
    if not found:
        raise UserError(f"{out} holds no result of ubgen-eval")
    return found


def predictions(out: Path, name: str) -> dict[str, np.ndarray]:
    """The columns of a result's predictions. UserError if they are missing or damaged."""
    path = out / PREDICTIONS / f"{name}.parquet"
    try:
        table = pyarrow.parquet.read_table(path)
    except FileNotFoundError:
        raise UserError(
            f"{path} is missing; delete {out / FIGURES / name}.json to compute it again"
        ) from None
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(
            f"{path} is damaged ({first_line(error)}); delete it and {out / FIGURES / name}.json, and the same "
            "command computes it again"
        ) from None
    return {column: table[column].to_numpy(zero_copy_only=False) for column in table.column_names}
