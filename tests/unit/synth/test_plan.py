"""What a run makes, in which order, and what makes it another run."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from ubgen.core.classes import ClassList
from ubgen.core.errors import UserError
from ubgen.core.stage import first_difference
from ubgen.dataset import ShardWriter, open_store
from ubgen.synth.config import SynthConfig
from ubgen.synth.plan import Plan, identity
from ubgen.synth.prompts import class_prompts

CLASSES = ClassList(("a", "b", "c"), ("ant", "bee\u202e", "crane/crow"))
CONFIG = SynthConfig(Path("engine"), "list.txt", per_class=3, out="out", shard_size=4)
PLAN = Plan(CLASSES, CLASSES.names, per_class=3, shard_size=4, format="png")


def run(config: SynthConfig = CONFIG, classes: ClassList = CLASSES, key: str = "key") -> dict[str, object]:
    prompts = class_prompts(classes, config.prompt, config.prompts)
    return identity(config, dataclasses.replace(PLAN, classes=classes, prompts=prompts), key)


def write_shard(out: Path, shard: int) -> None:
    with ShardWriter(out, shard, "png") as writer:
        for item in PLAN.shard_items(shard):
            image = np.full((8, 8, 3), 20 * item.position, np.uint8)
            writer.write(item.position, image, item.class_index, {}, {"quality": 1.0})


def test_every_prefix_is_balanced_and_every_image_made_once() -> None:
    items = [item for shard in range(PLAN.shards) for item in PLAN.shard_items(shard)]
    assert [item.position for item in items] == list(range(9))
    assert {(item.class_index, item.image_index) for item in items} == {
        (c, i) for c in range(3) for i in range(3)
    }
    assert [item.class_index for item in items] == [0, 1, 2] * 3
    assert [PLAN.shard_length(shard) for shard in range(PLAN.shards)] == [4, 4, 1]


def test_unfinished_shards_are_found(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    assert PLAN.unfinished(store) == [0, 1, 2]
    write_shard(tmp_path, 1)
    assert PLAN.unfinished(store) == [0, 2]
    smaller = dataclasses.replace(PLAN, shard_size=3)
    assert smaller.unfinished(store) == [0, 1, 2]


@pytest.mark.parametrize(
    "change",
    [
        {"batch": 2},
        {"workers": 7},
        {"executor": "static", "part": "1/2"},
        {"licence": "x"},
        {"base_model": "x/y"},
    ],
)
def test_it_is_the_same_run_whoever_makes_it(change: dict[str, object]) -> None:
    assert run(dataclasses.replace(CONFIG, **change)) == run()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("config", "classes", "key", "message"),
    [
        ({"seed": 1}, CLASSES, "key", "--seed was 0, now 1"),
        ({"steps": 20}, CLASSES, "key", "--steps was 50, now 20"),
        ({"guidance": 7.5}, CLASSES, "key", "--guidance was 2.0, now 7.5"),
        ({"per_class": 4}, CLASSES, "key", "--per-class was 3, now 4"),
        ({"shard_size": 8}, CLASSES, "key", "--shard-size was 4, now 8"),
        ({"format": "png"}, CLASSES, "key", "--format was 'jpg', now 'png'"),
        ({"min_quality": 3.0}, CLASSES, "key", "--min-quality was absent, now 3.0"),
        ({"min_similarity": 0.2}, CLASSES, "key", "--min-similarity was absent, now 0.2"),
        ({"attempts": 3}, CLASSES, "key", "--attempts was 10, now 3"),
        ({"exhausted": "fail"}, CLASSES, "key", "--exhausted was 'keep', now 'fail'"),
        ({"prompt": "a {name}"}, CLASSES, "key", "prompts[0] was 'ant', now 'a ant'"),
        ({}, CLASSES, "other", "engine key was 'key', now 'other'"),
        ({}, ClassList(("a", "b"), ("ant", "bee")), "key", "class ids had 3 entries, now 2"),
        (
            {},
            ClassList(CLASSES.ids, ("ant", "bee", "x")),
            "key",
            r"class names[1] was 'bee\u202e', now 'bee'",
        ),
    ],
)
def test_a_different_run_is_named(
    config: dict[str, object], classes: ClassList, key: str, message: str
) -> None:
    other = run(dataclasses.replace(CONFIG, **config), classes, key)  # type: ignore[arg-type]
    assert first_difference(run(), other) == message


def test_prompts_are_names_templates_or_overrides(tmp_path: Path) -> None:
    assert class_prompts(CLASSES, "{name}", None) == CLASSES.names
    overrides = tmp_path / "prompts.tsv"
    overrides.write_text("\ufeffc\tcrane, a bird with {name} braces\n\n", encoding="utf-8")
    assert class_prompts(CLASSES, "a {name}.", overrides) == (
        "a ant.",
        "a bee\u202e.",
        "crane, a bird with {name} braces",
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"x\tprompt", "line 1: no class has the id 'x'"),
        (b"a\tone\na\ttwo", "line 2: the id 'a' came before"),
        (b"a prompt", 'line 1: expected "id<TAB>prompt"'),
        (b"a\t", 'line 1: expected "id<TAB>prompt"'),
        (b"a\t\xff", "is not UTF-8"),
    ],
)
def test_wrong_overrides_are_named(tmp_path: Path, text: bytes, message: str) -> None:
    path = tmp_path / "prompts.tsv"
    path.write_bytes(text)
    with pytest.raises(UserError, match=message):
        class_prompts(CLASSES, "{name}", path)
    with pytest.raises(UserError, match="No such file"):
        class_prompts(CLASSES, "{name}", tmp_path / "gone")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"per_class": 0}, "--per-class must be at least 1, not 0"),
        ({"shard_size": -1}, "--shard-size"),
        ({"batch": 0}, "--batch"),
        ({"steps": 0}, "--steps"),
        ({"attempts": 0}, "--attempts"),
        ({"workers": 0}, "--workers"),
        ({"seed": -1}, "--seed"),
        ({"guidance": float("nan")}, "--guidance"),
        ({"min_similarity": 2.0}, r"--min-similarity must lie in -1\.\.1, not 2.0"),
        ({"min_quality": float("nan")}, "--min-quality"),
        ({"prompt": "a photo"}, "has no {name}"),
        ({"part": "1/2"}, "go together"),
        ({"executor": "static"}, "go together"),
        ({"executor": "static", "part": "0/2"}, r'--part must be like "3/16"'),
        ({"executor": "static", "part": "3/2"}, "--part"),
        ({"executor": "static", "part": "1/2", "overwrite": True}, "--overwrite does not go with"),
        ({"ray_address": "auto"}, "--ray-address needs --executor ray"),
        (
            {"encoder": "nvjpeg", "device": "cpu"},
            r"--encoder nvjpeg needs an engine on a GPU \(--device cuda",
        ),
        ({"encoder": "nvjpeg", "device": "cuda", "format": "png"}, "and --format jpg"),
        ({"device": "cuda:x"}, '--device must be "cpu", "cuda" or one GPU, such as "cuda:1", not \'cuda:x\''),
        ({"device": "gpu"}, "--device must be"),
        ({"out": ""}, "--out must name a directory"),
        ({"out": " "}, "--out must name a directory"),
    ],
)
def test_settings_out_of_range(change: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        dataclasses.replace(CONFIG, **change).check()  # type: ignore[arg-type]
