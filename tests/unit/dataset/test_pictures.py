"""Pictures: right files, right images, and no class name that breaks them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from PIL import Image

from ubgen.dataset import dataset_stats, is_marked_synthetic, open_dataset, write_pictures
from ubgen.dataset.tools.charts import score_figure, throughput_figure

RED = (255, 0, 0)


def test_all_files_whatever_the_names(tmp_path: Path, make: Callable[..., Path], hostile: list[str]) -> None:
    out = make(tmp_path / "d", hostile, per_shard=20, ids=["../x", "a/b", "..", *(f"n{i}" for i in range(7))])
    before = {p.name for p in tmp_path.iterdir()}
    backend, settings = matplotlib.get_backend(), dict(matplotlib.rcParams)
    names = write_pictures(open_dataset(out), out, [(0.0, 0), (1.0, 10), (2.0, 30)])
    assert names[0] == "contact-sheet.png"
    assert names[-2:] == ["scores.png", "throughput.png"]
    assert {"contact-sheets/class-000000.png", "contact-sheets/n0.png"} <= set(names)
    assert len(names) == 13
    for name in names:
        with Image.open(out / name) as image:
            image.load()
            assert min(image.size) > 90
    assert is_marked_synthetic((out / "contact-sheet.png").read_bytes())
    assert {p.name for p in tmp_path.iterdir()} == before
    assert (matplotlib.get_backend(), dict(matplotlib.rcParams)) == (backend, settings)


def test_a_class_sheet_shows_its_class(tmp_path: Path, make: Callable[..., Path]) -> None:
    def change(position: int, sample: dict[str, Any]) -> None:
        if sample["class_index"] == 1:
            sample["image"] = Image.new("RGB", (8, 8), RED)

    out = make(tmp_path / "d", ["a", "b", "c"], change=change, extension="png")
    write_pictures(open_dataset(out), out)
    reds = [red_share(out / "contact-sheets" / f"n00{i}.png") for i in range(3)]
    assert reds[1] > 0.2
    assert max(reds[0], reds[2]) < 0.01
    sheet = np.asarray(Image.open(out / "contact-sheet.png").convert("RGB"))
    thirds = [red_share(part) for part in np.array_split(sheet, 3)]
    assert thirds[1] > 0.5
    assert max(thirds[0], thirds[2]) < 0.05


def test_of_many_classes_the_worst_are_drawn(tmp_path: Path, make: Callable[..., Path]) -> None:
    def change(position: int, sample: dict[str, Any]) -> None:
        sample["scores"] = {"quality": float(200 - sample["class_index"])}

    out = make(tmp_path / "d", [f"class {i}" for i in range(130)], shards=1, per_shard=130, change=change)
    stale = out / "contact-sheets"
    stale.mkdir()
    (stale / "gone.png").write_bytes(b"")
    write_pictures(open_dataset(out), out)
    assert {p.name for p in stale.iterdir()} == {f"n{i:03d}.png" for i in range(30, 130)}
    write_pictures(open_dataset(out), out, sheets=None)
    assert {p.name for p in stale.iterdir()} == {f"n{i:03d}.png" for i in range(130)}


@pytest.mark.parametrize("pairs", [[], [(1.0, 5)], [(1.0, 5), (1.0, 6)]])
def test_too_few_moments_give_no_throughput(pairs: list[tuple[float, int]]) -> None:
    assert throughput_figure(pairs) is None


def test_throughput_of_days_with_repeated_and_swapped_moments() -> None:
    pairs = [(float(i // 2 * 600), i * 5000) for i in range(2000)]
    assert throughput_figure(pairs[::-1])


def test_no_scores_no_figure(tmp_path: Path, make: Callable[..., Path]) -> None:
    out = make(tmp_path / "d", change=lambda position, sample: sample.update(scores={}))
    stats = dataset_stats(open_dataset(out))
    assert score_figure(stats) is None
    assert "scores.png" not in write_pictures(open_dataset(out), out, stats=stats)


def red_share(image: Path | np.ndarray) -> float:
    pixels = np.asarray(Image.open(image).convert("RGB")) if isinstance(image, Path) else image
    return float((pixels == RED).all(axis=-1).mean())
