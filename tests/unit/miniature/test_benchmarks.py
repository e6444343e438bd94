import io
import json
import re
import sqlite3
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file

from ubgen.core.config import resolve_path
from ubgen.core.errors import UserError
from ubgen.loading.imageset import open_image_set
from ubgen.miniature import benchmarks
from ubgen.miniature.benchmarks import DATASETS, WriteConfig, cue_conflict, encode, focus, in9, write
from ubgen.miniature.networks import Oracle
from ubgen.miniature.shapes import CLASSES, TRAIN_CLASSES
from ubgen.miniature.tasks import TASKS
from ubgen.miniature.world import SCENES, TEXTURES, biased_scene, biased_texture

SCALE = 0.01


def config(out: Path, **changes: object) -> WriteConfig:
    return WriteConfig(**{"write": "benchmarks", "out": out, "scale": SCALE, **changes})  # type: ignore[arg-type]


def silent() -> Console:
    return Console(file=io.StringIO(), width=200)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out: Path = tmp_path_factory.mktemp("world") / "benchmarks"
    write(config(out), silent())
    return out


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    found = Oracle().eval()
    weights = load_file(resolve_path("ubgen:miniature/weights") / "oracle/model.safetensors")
    found.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in weights.items()})
    return found


def seen(oracle: Oracle, pictures: list[np.ndarray], head: str) -> np.ndarray:
    with torch.no_grad():
        logits = oracle(torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255)
    return logits[head].argmax(1).numpy()


def mapping(name: str) -> dict:
    return json.loads((resolve_path("ubgen:data/benchmarks") / f"{name}-miniature.json").read_text())


def test_each_file_is_what_the_seed_and_its_number_say(written: Path) -> None:
    """Drawn again, one dataset at a time, every file has the same bytes; and there is no other."""
    again = {}
    for dataset in DATASETS:
        for name, content in dataset.draw(0, dataset.scaled(SCALE)):
            path = Path(dataset.name, name)
            again[path] = content if isinstance(content, bytes) else encode(content, path.suffix)
    found = {path.relative_to(written): path for path in written.rglob("[!.]*") if path.is_file()}
    assert set(found) - set(again) == {Path("run.json"), Path("manifest.json"), Path("benchmarks.json")}
    for path, content in again.items():
        assert found[path].read_bytes() == content, path


def test_what_each_is_for_is_written_beside_them(written: Path) -> None:
    suite = json.loads((written / "benchmarks.json").read_text())
    assert {kind: len(names) for kind, names in suite.items()} == {"transfer": 6, "bias": 3, "val": 2}
    assert all((written / name).is_dir() for names in suite.values() for name in names)


def test_more_pictures_begin_with_the_same_ones() -> None:
    for dataset in DATASETS:
        if dataset.name not in ("in9", "cue-conflict", "coco", "ade20k"):
            few, more = dict(dataset.draw(3, 1)), dict(dataset.draw(3, 2))
            pictures = [name for name in few if name.endswith(("png", "jpg"))]
            assert all(np.array_equal(few[name], more[name]) for name in pictures), dataset.name


def test_another_seed_gives_other_pictures() -> None:
    for dataset in DATASETS:
        (name, one), (_, other) = next(dataset.draw(0, 1)), next(dataset.draw(1, 1))
        assert one.shape != other.shape or not np.array_equal(one, other), name  # type: ignore[union-attr]


def test_training_and_test_pictures_differ() -> None:
    for task in TASKS:
        train, test = (dict(d.draw(0, 2)) for d in DATASETS if d.name.startswith(f"{task.name}/"))
        digests = [{content.tobytes() for content in files.values()} for files in (train, test)]  # type: ignore[union-attr]
        assert not digests[0] & digests[1]


def test_image_folders_have_every_class_equally_often(written: Path) -> None:
    folders = [(f"{task.name}/{split}", task.classes) for task in TASKS for split in ("train", "test")]
    folders += [
        (f"{split}-{kind}", TRAIN_CLASSES) for split in ("train", "val") for kind in ("fair", "biased")
    ]
    for name, classes in folders:
        images = open_image_set(written / name)
        assert images.class_ids == tuple(sorted(classes))
        assert len(set(images.counts().tolist())) == 1
        assert images.counts().min() >= 2


def test_the_whole_size_is_that_of_a_small_real_benchmark() -> None:
    counts = Counter[str]()
    for dataset in DATASETS:
        counts[dataset.name] += dataset.scaled(1.0) * dataset.images_each
    for task in TASKS:
        assert 1450 <= counts[f"{task.name}/train"] <= 1500
        assert 980 <= counts[f"{task.name}/test"] <= 1000
    assert counts["cue-conflict"] == 640
    assert counts["focus"] == 1600
    assert counts["in9"] == 2000
    assert counts["coco"] == counts["ade20k"] == 600
    assert 20_000 <= counts.total() <= 30_000


def test_cue_conflict_sets_the_shape_of_one_class_on_the_context_of_another(oracle: Oracle) -> None:
    names, pictures = zip(*cue_conflict(0, 2), strict=True)
    parts = [re.fullmatch(r"([a-z]+)/([a-z]+)(\d+)-([a-z]+)(\d+)\.png", name) for name in names]
    assert all(part is not None and part[1] == part[2] for part in parts)
    pairs = Counter((part[2], part[4]) for part in parts if part)
    categories = mapping("cue-conflict")["categories"]
    assert set(pairs) == {(a, b) for a in categories for b in categories}
    assert set(pairs.values()) == {2}
    shape = np.array([CLASSES.index(part[2]) for part in parts if part])
    texture = np.array([CLASSES.index(part[4]) for part in parts if part])
    assert (seen(oracle, list(pictures), "label") == shape).mean() > 0.9
    contexts = [biased_scene(int(k)) for k in texture]
    assert (seen(oracle, list(pictures), "scene") == contexts).mean() > 0.95
    surfaces = [biased_texture(int(k)) for k in texture]
    assert (seen(oracle, list(pictures), "texture") == surfaces).mean() > 0.85


def test_no_two_categories_of_cue_conflict_share_a_context() -> None:
    tied = [(biased_scene(k), biased_texture(k)) for k in range(len(TRAIN_CLASSES))]
    categories = mapping("cue-conflict")["categories"]
    assert categories == {CLASSES[k]: {"class_ids": [CLASSES[k]]} for k in range(8)}
    assert len(set(tied[:8])) == 8
    assert set(tied[8:]) <= set(tied[:8])  # why ring and flower are in no category


def test_focus_has_each_class_equally_often_with_none_to_three_uncommon_attributes(oracle: Oracle) -> None:
    *images, (name, content) = focus(0, 3)
    assert name == "annotations.db"
    assert isinstance(content, bytes)
    rows = table(content)
    assert [row[0] for row in rows] == [f"/{name}" for name, _ in images]  # a character too many
    about = mapping("focus")
    counts, common = Counter[tuple[str, int]](), []
    for i, (file, category, time, weather, locations, humans) in enumerate(rows):
        assert file.split("/")[1] == category
        assert humans == "no"
        places = locations.split(", ")
        assert places == sorted(places)
        assert {time} <= set(about["attributes"]["time"])
        assert {weather} <= set(about["attributes"]["weather"])
        assert set(places) <= set(about["attributes"]["locations"])
        odd = about["categories"][category]["uncommon"]
        k = (time in odd["time"]) + (weather in odd["weather"]) + bool(set(places) & set(odd["locations"]))
        counts[category, k] += 1
        if not k:
            common.append(i)
    assert counts == {(name, k): 3 for name in TRAIN_CLASSES for k in range(4)}
    assert any(", " in row[4] for row in rows)
    pictures = [images[i][1] for i in common]
    for head, right in (("label", 1), ("scene", 4), ("texture", 3)):
        names = {"label": CLASSES, "scene": SCENES, "texture": TEXTURES}[head]
        wanted = [names.index(rows[i][right]) for i in common]
        assert (seen(oracle, pictures, head) == wanted).mean() > 0.85, head  # type: ignore[arg-type]
    light = [[images[i][1].mean() for i, row in enumerate(rows) if row[2] == t] for t in ("day", "night")]  # type: ignore[union-attr]
    assert np.mean(light[0]) > 1.5 * np.mean(light[1])


def table(content: bytes) -> list[tuple[str, ...]]:
    db = sqlite3.connect(":memory:")
    db.deserialize(content)
    return db.execute(
        "SELECT file_name, category, time, weather, locations, humans FROM annotations"
    ).fetchall()


def test_what_is_uncommon_in_focus_is_what_the_biased_world_does_not_tie_to_the_class() -> None:
    about = mapping("focus")
    assert list(about["categories"]) == list(TRAIN_CLASSES)
    for k, (name, entry) in enumerate(about["categories"].items()):
        assert entry["class_ids"] == [name]
        assert entry["uncommon"] == {
            "time": ["night"],
            "weather": [t for t in TEXTURES if t != TEXTURES[biased_texture(k)]],
            "locations": [s for s in SCENES if s != SCENES[biased_scene(k)]],
        }


def test_in9_shows_each_foreground_on_four_backgrounds(oracle: Oracle) -> None:
    variants: dict[str, dict[str, np.ndarray]] = {}
    names: dict[str, list[str]] = {}
    for name, pixels in in9(0, 6):
        variant, val, folder, file = name.split("/")
        assert val == "val"
        stem = file.removesuffix(".JPEG").removeprefix("fg_")
        foreground = stem.partition("_bg_")[0]
        variants.setdefault(variant, {})[f"{folder}/{foreground}"] = pixels  # type: ignore[assignment]
        names.setdefault(variant, []).append(f"{folder}/{file}")
    assert set(variants) == {"original", "mixed_same", "mixed_rand", "only_fg"}
    keys = list(variants["original"])
    assert len(keys) == 60
    assert all(list(pictures) == keys for pictures in variants.values())
    for key in keys:
        # away from the antialiased border the object is the same, pixel for pixel
        inside = (variants["only_fg"][key] > 0).any(2)
        inside[1:-1, 1:-1] &= inside[:-2, 1:-1] & inside[2:, 1:-1] & inside[1:-1, :-2] & inside[1:-1, 2:]
        whole = [pictures[key].astype(int) for pictures in variants.values()]
        agree = np.all([np.abs(w - whole[0]).max(2) == 0 for w in whole], axis=0)
        assert agree[inside].mean() > 0.7
    labels = np.array([CLASSES.index(key.split("/")[1].split("_")[0]) for key in keys])
    for variant in ("original", "mixed_same", "mixed_rand"):
        assert (seen(oracle, [variants[variant][key] for key in keys], "label") == labels).mean() > 0.85


def test_in9_takes_backgrounds_from_the_originals_that_the_name_says(oracle: Oracle) -> None:
    pictures = dict(in9(1, 8))
    originals = {
        name.split("/")[-1].removesuffix(".JPEG"): p for name, p in pictures.items() if name[:3] == "ori"
    }
    groups = {c: e["folder"] for e in mapping("in9")["categories"].values() for c in e["class_ids"]}
    same = Counter[bool]()
    for name, pixels in pictures.items():
        if found := re.fullmatch(r"mixed_(same|rand)/val/(.+)/fg_(.+)_bg_(.+)\.JPEG", name):
            variant, folder, foreground, background = found.groups()
            assert folder == groups[foreground.split("_")[0]]
            in_group = groups[background.split("_")[0]] == folder
            assert in_group or variant == "rand"
            same[in_group] += variant == "rand"
            shared = (np.abs(pixels.astype(int) - originals[background]).max(2) == 0).mean()  # type: ignore[union-attr]
            assert shared > 0.3
    assert 0 < same[True] < same[False]


def test_in9_groups_are_the_classes_with_one_background() -> None:
    categories = mapping("in9")["categories"]
    assert [(entry["folder"], entry["class_ids"]) for entry in categories.values()] == [
        (folder, [CLASSES[k] for k in group]) for folder, group in benchmarks.in9_groups()
    ]
    assert sorted(c for entry in categories.values() for c in entry["class_ids"]) == sorted(TRAIN_CLASSES)
    for entry in categories.values():
        assert len({biased_scene(CLASSES.index(c)) for c in entry["class_ids"]}) == 1


def test_the_biased_folders_follow_the_class_and_the_fair_ones_do_not(oracle: Oracle) -> None:
    share = {}
    for name in ("val-fair", "val-biased"):
        (dataset,) = (d for d in DATASETS if d.name == name)
        names, pictures = zip(*dataset.draw(0, 15), strict=True)
        labels = [CLASSES.index(file.split("/")[0]) for file in names]
        assert (seen(oracle, list(pictures), "label") == labels).mean() > 0.85
        tied = [biased_scene(k) for k in labels]
        share[name] = (seen(oracle, list(pictures), "scene") == tied).mean()
    assert share["val-fair"] < 0.25
    assert share["val-biased"] > 0.8


def test_a_finished_directory_is_left_alone_and_another_run_is_refused(written: Path, tmp_path: Path) -> None:
    before = (written / "manifest.json").stat().st_mtime_ns
    write(config(written), silent())
    assert (written / "manifest.json").stat().st_mtime_ns == before
    with pytest.raises(UserError, match=r"seed was 0, now 1\); choose another --out"):
        write(config(written, seed=1), silent())
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds notes\.txt\); choose an empty or new one"):
        write(config(tmp_path), silent())


@pytest.mark.parametrize(("changes", "message"), [({"scale": 0.0}, "--scale"), ({"seed": -1}, "--seed")])
def test_what_cannot_be_written_is_refused(changes: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        write(config(tmp_path / "new", **changes), silent())
    assert not (tmp_path / "new").exists()


def test_jpegs_are_close_to_what_was_drawn() -> None:
    name, pixels = next(focus(0, 1))
    decoded = np.asarray(Image.open(io.BytesIO(encode(pixels, Path(name).suffix))))  # type: ignore[arg-type]
    assert np.abs(decoded.astype(int) - pixels).mean() < 3


def test_help_imports_nothing_heavy() -> None:
    program = (
        "import runpy, sys; sys.argv = ['world', '--help']\n"
        "try: runpy.run_module('ubgen.miniature.world', run_name='__main__')\n"
        "finally: print(*sys.modules, file=sys.stderr)"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "--write" in answer.stdout
    assert not {"torch", "matplotlib", "transformers"} & set(answer.stderr.split())
