"""What a run makes, in which order, and when it may be continued."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from ubgen.core.classes import ClassList
from ubgen.core.errors import UserError
from ubgen.dataset import ShardWriter, open_store
from ubgen.synth.config import SynthConfig
from ubgen.synth.plan import Plan, class_prompts, exhausted_file, identity, read_record, start_or_resume

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


def test_the_same_run_continues_whoever_makes_it(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    start_or_resume(store, run(), overwrite=False)
    for other in (
        {"batch": 2},
        {"workers": 7},
        {"executor": "static", "part": "1/2"},
        {"licence": "x"},
        {"base_model": "x/y"},
    ):
        start_or_resume(store, run(dataclasses.replace(CONFIG, **other)), overwrite=False)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("config", "classes", "key", "message"),
    [
        ({"seed": 1}, CLASSES, "key", r"another --seed \(0 there, 1 now\)"),
        ({"steps": 20}, CLASSES, "key", r"another --steps \(50 there, 20 now\)"),
        ({"guidance": 7.5}, CLASSES, "key", "another --guidance"),
        ({"per_class": 4}, CLASSES, "key", "another --per-class"),
        ({"shard_size": 8}, CLASSES, "key", "another --shard-size"),
        ({"format": "png"}, CLASSES, "key", "another --format"),
        ({"min_quality": 3.0}, CLASSES, "key", r"another --min-quality \(None there, 3.0 now\)"),
        ({"min_similarity": 0.2}, CLASSES, "key", "another --min-similarity"),
        ({"attempts": 3}, CLASSES, "key", "another --attempts"),
        ({"exhausted": "fail"}, CLASSES, "key", "another --exhausted"),
        ({"prompt": "a {name}"}, CLASSES, "key", "another prompts .class 0 is 'ant' there, 'a ant' now"),
        ({}, CLASSES, "other", r"another engine key \('key' there, 'other' now\)"),
        ({}, ClassList(("a", "b"), ("ant", "bee")), "key", r"another class ids \(3 there, 2 now\)"),
        ({}, ClassList(CLASSES.ids, ("ant", "bee", "x")), "key", r"another class names \(class 1 is"),
    ],
)
def test_a_different_run_is_refused_and_named(
    tmp_path: Path, config: dict[str, object], classes: ClassList, key: str, message: str
) -> None:
    store = open_store(tmp_path)
    start_or_resume(store, run(), overwrite=False)
    write_shard(tmp_path, 0)
    other = run(dataclasses.replace(CONFIG, **config), classes, key)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=message):
        start_or_resume(store, other, overwrite=False)


def test_a_run_that_made_nothing_is_replaced(tmp_path: Path) -> None:
    """Unless it is one of several parts, which may be at work on their first shards."""
    store = open_store(tmp_path)
    start_or_resume(store, run(), overwrite=False)
    store.write(exhausted_file(PLAN.item(7)), "{}\n")
    other = run(dataclasses.replace(CONFIG, seed=1))
    with pytest.raises(UserError, match="another --seed"):
        start_or_resume(store, other, overwrite=False, alone=False)
    assert read_record(store) == run()
    start_or_resume(store, other, overwrite=False)
    assert read_record(store) == other
    assert store.names() == ["run.json"]


def test_overwriting_removes_ours_and_nothing_else(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    start_or_resume(store, run(), overwrite=False)
    write_shard(tmp_path, 0)
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    (tmp_path / "shard-notes.json").write_text("mine", encoding="utf-8")
    (tmp_path / "exhausted-000000007.jsonl").write_text("{}", encoding="utf-8")
    start_or_resume(store, run(key="other"), overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes.txt", "run.json", "shard-notes.json"]


@pytest.mark.parametrize("name", ["README.md", "shard-000000.tar", "a-directory/", "manifest.json"])
def test_what_no_run_of_ours_left_is_refused(tmp_path: Path, name: str) -> None:
    """Also by overwriting: a directory is ours by its run.json alone."""
    path = tmp_path / name
    path.mkdir() if name.endswith("/") else path.write_text("theirs", encoding="utf-8")
    (tmp_path / ".lock").touch()
    for overwrite in (False, True):
        with pytest.raises(UserError, match=rf"holds something else \({path.name}\); choose an empty --out"):
            start_or_resume(open_store(tmp_path), run(), overwrite)
    for text in ("{", "[]", '{"wandb": 1}', "\xff"):
        (tmp_path / "run.json").write_bytes(text.encode("latin-1"))
        with pytest.raises(UserError, match=r"run\.json is not that of a ubgen-synth run"):
            start_or_resume(open_store(tmp_path), run(), overwrite=True)
    assert {p.name for p in tmp_path.iterdir()} == {path.name, ".lock", "run.json"}


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
