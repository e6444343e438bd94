"""What a run makes, in which order, and when it may be continued."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ubgen.classes import ClassList
from ubgen.dataset import ShardWriter, open_dataset, write_classes
from ubgen.errors import UserError
from ubgen.synth.config import SynthConfig
from ubgen.synth.plan import Plan, identity, start_or_resume
from ubgen.synth.sheet import write_sheet
from ubgen.synth.stats import dataset_stats

CLASSES = ClassList(("a", "b", "c"), ("ant", "bee\u202e", "crane/crow"))
CONFIG = SynthConfig(Path("engine"), "list.txt", per_class=3, out=Path("out"), shard_size=4)
PLAN = Plan(CLASSES, per_class=3, shard_size=4)


def write_shard(out: Path, shard: int) -> None:
    with ShardWriter(out, shard, "png") as writer:
        for item in PLAN.shard_items(shard):
            scores = {"clip_similarity": item.class_index / 10, "quality": 1.0 + item.image_index}
            image = Image.fromarray(np.full((8, 8, 3), 20 * item.position, np.uint8))
            writer.write(item.position, image, item.class_index, {}, scores)


def test_every_prefix_is_balanced_and_every_image_made_once() -> None:
    items = [item for shard in range(PLAN.shards) for item in PLAN.shard_items(shard)]
    assert [item.position for item in items] == list(range(9))
    assert {(item.class_index, item.image_index) for item in items} == {
        (c, i) for c in range(3) for i in range(3)
    }
    assert [item.class_index for item in items] == [0, 1, 2] * 3
    assert [PLAN.shard_length(shard) for shard in range(PLAN.shards)] == [4, 4, 1]


def test_unfinished_shards_are_found(tmp_path: Path) -> None:
    assert PLAN.unfinished(tmp_path) == [0, 1, 2]
    write_shard(tmp_path, 1)
    assert PLAN.unfinished(tmp_path) == [0, 2]
    smaller = dataclasses.replace(PLAN, shard_size=3)
    assert smaller.unfinished(tmp_path) == [0, 1, 2]


def test_the_same_run_continues(tmp_path: Path) -> None:
    run = identity(CONFIG, CLASSES, "key")
    start_or_resume(tmp_path, run, overwrite=False)
    start_or_resume(tmp_path, run, overwrite=False)
    start_or_resume(tmp_path, identity(dataclasses.replace(CONFIG, batch=2), CLASSES, "key"), overwrite=False)


@pytest.mark.parametrize(
    ("config", "classes", "key", "message"),
    [
        ({"seed": 1}, CLASSES, "key", r"another --seed \(0 there, 1 now\)"),
        ({"steps": 20}, CLASSES, "key", r"another --steps \(50 there, 20 now\)"),
        ({"guidance": 7.5}, CLASSES, "key", "another --guidance"),
        ({"per_class": 4}, CLASSES, "key", "another --per-class"),
        ({"shard_size": 8}, CLASSES, "key", "another --shard-size"),
        ({"format": "png"}, CLASSES, "key", "another --format"),
        ({}, CLASSES, "other", r"another engine key \('key' there, 'other' now\)"),
        ({}, ClassList(("a", "b"), ("ant", "bee")), "key", r"another class ids \(3 there, 2 now\)"),
        ({}, ClassList(CLASSES.ids, ("ant", "bee", "x")), "key", r"another class names \(class 1 is"),
    ],
)
def test_a_different_run_is_refused_and_named(
    tmp_path: Path, config: dict[str, object], classes: ClassList, key: str, message: str
) -> None:
    start_or_resume(tmp_path, identity(CONFIG, CLASSES, "key"), overwrite=False)
    other = identity(dataclasses.replace(CONFIG, **config), classes, key)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=message):
        start_or_resume(tmp_path, other, overwrite=False)


def test_overwriting_removes_ours_and_nothing_else(tmp_path: Path) -> None:
    start_or_resume(tmp_path, identity(CONFIG, CLASSES, "key"), overwrite=False)
    write_shard(tmp_path, 0)
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    (tmp_path / "shard-notes.json").write_text("mine", encoding="utf-8")
    start_or_resume(tmp_path, identity(CONFIG, CLASSES, "other"), overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes.txt", "run.json", "shard-notes.json"]


def test_shards_of_an_unknown_run_are_left_alone(tmp_path: Path) -> None:
    write_shard(tmp_path, 0)
    with pytest.raises(UserError, match=r"shard-000000\.\w+ of an unknown run"):
        start_or_resume(tmp_path, identity(CONFIG, CLASSES, "key"), overwrite=False)
    (tmp_path / "run.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match=r"run\.json is not valid JSON"):
        start_or_resume(tmp_path, identity(CONFIG, CLASSES, "key"), overwrite=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"per_class": 0}, "--per-class must be at least 1, not 0"),
        ({"shard_size": -1}, "--shard-size"),
        ({"batch": 0}, "--batch"),
        ({"steps": 0}, "--steps"),
        ({"seed": -1}, "--seed"),
        ({"guidance": float("nan")}, "--guidance"),
    ],
)
def test_settings_out_of_range(change: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        dataclasses.replace(CONFIG, **change).check()  # type: ignore[arg-type]


def test_figures_and_contact_sheet(tmp_path: Path) -> None:
    write_classes(tmp_path, CLASSES.ids, CLASSES.names, CLASSES.names)
    for shard in range(PLAN.shards):
        write_shard(tmp_path, shard)
    dataset = open_dataset(tmp_path, partial=True)
    stats = dataset_stats(dataset)
    assert stats["images"] == 9
    assert stats["clip_similarity"]["class_means"] == [0.0, 0.1, 0.2]
    assert (stats["quality"]["mean"], stats["quality"]["min"], stats["quality"]["max"]) == (2.0, 1.0, 3.0)
    write_sheet(dataset, PLAN, tmp_path / "sheet.png")
    pixels = np.asarray(Image.open(tmp_path / "sheet.png"))
    centres = pixels[4 + 48 :: 100, 150 + 48 :: 100, 0][:3, :3]
    assert centres.tolist() == [[0, 60, 120], [20, 80, 140], [40, 100, 160]]
