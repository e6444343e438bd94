"""croissant.json and samples.csv agree with the dataset (mlcroissant itself: tests/integration/dataset)."""

import csv
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ubgen.dataset import CardFacts, dataset_stats, open_dataset, write_croissant


@pytest.mark.parametrize("extension", ["jpg", "png"])
def test_files_and_checksums(tmp_path: Path, make: Callable[..., Path], extension: str) -> None:
    out = make(tmp_path / "d", ["a\nb", "c"], extension=extension)
    write_croissant(out, facts(out, extension))
    text = (out / "croissant.json").read_text(encoding="utf-8")
    document = json.loads(text)
    files = {d["contentUrl"]: d for d in document["distribution"] if d["@type"] == "cr:FileObject"}
    assert set(files) == {"shard-000000.tar", "shard-000001.tar", "samples.csv", "classes.json"}
    for name, file in files.items():
        assert file["sha256"] == hashlib.sha256((out / name).read_bytes()).hexdigest()
    assert document["license"] == "mit"
    assert "All images are synthetic" in document["description"]
    assert "engine: key" in document["description"]


def test_the_table_of_samples(tmp_path: Path, make: Callable[..., Path]) -> None:
    def change(position: int, sample: dict[str, Any]) -> None:
        sample["flag"] = "quality" if position == 5 else None

    out = make(tmp_path / "d", change=change)
    write_croissant(out, facts(out, "jpg"))
    rows = list(csv.DictReader((out / "samples.csv").open(encoding="utf-8")))
    entries = list(open_dataset(out).entries())
    assert [row["file"] for row in rows] == [f"{e.key}.jpg" for e in entries]
    assert [int(row["class_index"]) for row in rows] == [e.class_index for e in entries]
    assert [float(row["quality"]) for row in rows] == [e.scores["quality"] for e in entries]
    assert [int(row["shard"]) for row in rows] == [0] * 6 + [1] * 6
    assert [row["flag"] for row in rows] == ["quality" if i == 5 else "" for i in range(12)]


def facts(out: Path, extension: str) -> CardFacts:
    stats = dataset_stats(open_dataset(out))
    return CardFacts("t", 12, 2, 2, extension, 6, "PNDM", 0, "name", "key", licence="mit", stats=stats)
