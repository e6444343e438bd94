"""A file of features, (N, D) float16 of length 1, and a JSON beside it: of which images, by which encoder."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ubgen.core.errors import UserError
from ubgen.core.files import atomic_write, replacing
from ubgen.dataset.text import plain
from ubgen.measures.diversity import normalised_blocks


@dataclass(frozen=True)
class FeaturesNote:
    """The JSON beside a file of features."""

    encoder: str
    """Its name, for people."""
    identity: str
    """ "sha256:<hex>" of its weights and input settings."""
    dataset: str
    """Where the images lay, for people."""
    fingerprint: str
    """Of the dataset: classes, labels, keys and sizes of its images in order."""
    images: int
    dim: int

    def require(self, path: Path, fingerprint: str, images: int, dataset: object) -> None:
        """UserError unless the features are of this dataset."""
        if self.images != images:
            raise UserError(
                f"{path} holds features of {self.images:,} images of {plain(self.dataset)}, but {plain(dataset)} has "
                f"{images:,}; run ubgen-dataset features on it"
            )
        if self.fingerprint != fingerprint:
            raise UserError(
                f"{path} was made from {plain(self.dataset)}, whose images or labels are not those of "
                f"{plain(dataset)}; run ubgen-dataset features on it"
            )


def note_path(path: Path) -> Path:
    """FILE.json of FILE.npy."""
    return path.with_suffix(".json")


def write_features(path: Path, rows_ND: np.ndarray, note: FeaturesNote) -> None:
    """The rows, each divided by its length, and then the note. UserError for a row that is zero or not finite."""
    note_path(path).unlink(missing_ok=True)  # of other features
    with replacing(path) as file:
        header = {"descr": "<f2", "fortran_order": False, "shape": (len(rows_ND), rows_ND.shape[1])}
        np.lib.format.write_array_header_1_0(file, header)
        for _, rows in normalised_blocks(rows_ND):
            file.write(rows.astype("<f2").tobytes())
    atomic_write(note_path(path), json.dumps(asdict(note), indent=1) + "\n")


def read_features(path: Path) -> tuple[np.ndarray, FeaturesNote]:
    """(N, D) float16, mapped from the file and not read into memory, and its note. UserError if either is damaged."""
    note = _read_note(path)
    try:
        rows = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; ubgen-dataset features makes it") from None
    except (OSError, ValueError, EOFError):
        raise UserError(f"{path} is damaged, or not a file of ubgen-dataset features") from None
    if rows.dtype.kind != "f" or rows.shape != (note.images, note.dim):
        raise UserError(
            f"{path} holds {rows.dtype} of shape {rows.shape}, but {note_path(path).name} beside it says "
            f"{note.images} x {note.dim} numbers"
        )
    return rows, note


def _read_note(path: Path) -> FeaturesNote:
    beside = note_path(path)
    try:
        content = json.loads(beside.read_bytes())
        note = FeaturesNote(**content)
        if all(type(content[name]) is kind for name, kind in FeaturesNote.__annotations__.items()):
            return note
    except FileNotFoundError:
        raise UserError(
            f"{beside} is missing, which says of which images {path.name} is; ubgen-dataset features writes both"
        ) from None
    except (OSError, ValueError, TypeError, KeyError):
        pass
    raise UserError(f"{beside} is damaged, or not of ubgen-dataset features")


class Joined:
    """Arrays that follow each other as one, of which slices and sorted rows are read when they are asked for."""

    def __init__(self, parts: list[np.ndarray]) -> None:
        self._parts = parts
        self._starts = np.cumsum([0, *map(len, parts)])
        self.shape = (int(self._starts[-1]), parts[0].shape[1])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        wanted = np.arange(len(self))[rows] if isinstance(rows, slice) else np.asarray(rows)
        return np.concatenate([*self._pieces(wanted)]) if len(wanted) else np.empty((0, self.shape[1]))

    def _pieces(self, wanted: np.ndarray) -> Iterator[np.ndarray]:
        owners = np.searchsorted(self._starts, wanted, side="right") - 1
        cuts = np.flatnonzero(np.diff(owners)) + 1
        for piece in np.split(wanted, cuts):
            owner = int(np.searchsorted(self._starts, piece[0], side="right") - 1)
            yield self._parts[owner][piece - self._starts[owner]]
