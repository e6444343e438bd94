"""`verify` finds damage of every kind, in the shard where it is, and `repair` takes just that away."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ubgen.core.errors import UserError
from ubgen.dataset import ShardWriter
from ubgen.dataset.tools.verify import repair, verify

Make = Callable[..., Path]


@pytest.mark.parametrize("extension", ["jpg", "png"])
def test_a_whole_dataset(tmp_path: Path, make: Make, extension: str) -> None:
    out = make(tmp_path / "d", extension=extension)
    ledger = [{"class_index": 0, "image_index": i, "attempt": 0, "reason": "constant"} for i in (1, 0)]
    (out / "rejections.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in ledger))
    seen: list[tuple[int, int]] = []
    result = verify(out, progress=lambda done, total: seen.append((done, total)))
    assert result.problems == []
    assert (result.shards, result.images, result.rejected, result.class_counts) == (2, 12, 2, [6, 6])
    assert result.bytes == sum(p.stat().st_size for p in out.glob("*.tar"))
    assert seen == [(0, 2), (1, 2), (2, 2)]


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Someone edits the sidecar and keeps its stated length right."""
    sidecar = json.loads(path.read_text())
    change(sidecar)
    lists = {name: sidecar.pop(name) for name in ("samples", "rejected")}
    rest = json.dumps(lists, separators=(",", ":"))[1:] + "\n"
    sidecar["rest"] = len(rest)
    path.write_text(json.dumps(sidecar, separators=(",", ":"))[:-1] + "," + rest)


def image_place(out: Path) -> int:
    return json.loads((out / "shard-000001.json").read_text())["samples"][2]["image"][0]


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "a bit in an image": (lambda d: flip(d / "shard-000001.tar", image_place(d) + 300), "SHA-256"),
    "a bit in a tar header": (
        lambda d: flip(d / "shard-000001.tar", image_place(d) - 512),
        "where the sidecar says",
    ),
    "a bit after the end": (lambda d: flip(d / "shard-000001.tar", -1), "more than its sidecar lists"),
    "a short tar": (lambda d: (d / "shard-000001.tar").write_bytes(b"x"), "missing, or not of the size"),
    "no tar": (lambda d: (d / "shard-000001.tar").unlink(), "missing"),
    "no sidecar": (lambda d: (d / "shard-000001.json").unlink(), "missing"),
    "a short sidecar": (lambda d: (d / "shard-000001.json").write_text('{"shard":'), "missing"),
    "no index": (lambda d: (d / "shard-000001.idx").unlink(), "shard-000001.idx"),
    "another index": (lambda d: flip(d / "shard-000001.idx", 20), "does not index the tar"),
    "another checksum": (lambda d: tampered(d, lambda s: s.update(sha256="0" * 64)), "SHA-256"),
    "another label": (
        lambda d: tampered(d, lambda s: s["samples"][0].update(class_index=1)),
        "is not the class 1",
    ),
    "no such label": (
        lambda d: tampered(d, lambda s: s["samples"][0].update(class_index=2)),
        "has class 2; classes.json has 2 classes",
    ),
    "a huge label": (
        lambda d: tampered(d, lambda s: s["samples"][0].update(class_index=2**70)),
        "is damaged",
    ),
    "another score": (
        lambda d: tampered(d, lambda s: s["samples"][0].update(quality=5.0)),
        "does not say what",
    ),
    "a place outside": (
        lambda d: tampered(d, lambda s: s["samples"][0].update(image=[512, 10**12])),
        "has no sample",
    ),
    "a place of text": (
        lambda d: tampered(d, lambda s: s["samples"][0].update(image="x")),
        "is damaged",
    ),
    "a sample twice": (
        lambda d: tampered(d, lambda s: s["samples"].insert(1, s["samples"][0])),
        "does not follow",
    ),
    "a sample less": (lambda d: tampered(d, lambda s: s["samples"].pop()), "states 6 samples and lists 5"),
    "a strange rejection": (
        lambda d: tampered(d, lambda s: s["rejected"][0].pop("reason")),
        "without a reason",
    ),
    "a rejection of text": (
        lambda d: tampered(d, lambda s: s["rejected"][0].update(attempt="x")),
        "without a reason",
    ),
    "no list of rejections": (lambda d: tampered(d, lambda s: s.update(rejected={})), "is damaged"),
    "a huge count": (lambda d: tampered(d, lambda s: s.update(count=10**30)), "missing, or not of the size"),
}


def tampered(out: Path, change: Callable[[dict[str, Any]], None]) -> None:
    edit(out / "shard-000001.json", change)


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Made by the first test that needs it, copied by each."""
    return {"at": tmp_path_factory.mktemp("whole") / "d"}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found_where_it_is(tmp_path: Path, make: Make, whole: dict[str, Path], kind: str) -> None:
    if not whole["at"].exists():
        make(whole["at"])
    out = Path(shutil.copytree(whole["at"], tmp_path / "d"))
    damage, message = DAMAGE[kind]
    damage(out)
    result = verify(out)
    assert result.damaged == [1]
    assert any(message in str(problem) for problem in result.problems), result.problems
    assert all(str(problem).startswith("shard-000001: ") for problem in result.problems)
    assert not any("\n" in str(problem) for problem in result.problems)
    repair(out, result)
    gone = {p.name for p in whole["at"].iterdir()} - {p.name for p in out.iterdir()}
    assert {"manifest.json", "shard-000001.json"} <= gone
    assert gone <= {"manifest.json", "shard-000001.json", "shard-000001.tar", "shard-000001.idx"}


def test_images_that_do_not_decode(tmp_path: Path, make: Make) -> None:
    def change(position: int, sample: dict[str, Any]) -> None:
        if position == 8:
            sample["image"] = b"\xff\xd8\xff\xe0 this is no image"
        if position == 9:
            sample["image"] = b"GIF89a"

    out = make(tmp_path / "d", change=change)
    assert verify(out, decode=False).problems == []
    result = verify(out)
    assert [str(p)[:41] for p in result.problems] == [
        "shard-000001: 000000008.jpg cannot be dec",
        "shard-000001: 000000009.jpg cannot be dec",
    ]


def test_counts_and_ledger_of_the_whole(tmp_path: Path, make: Make) -> None:
    out = make(tmp_path / "d")
    (out / "run.json").write_text('{"stage": "synth", "identity": {"--per-class": 7}}')
    (out / "rejections.jsonl").write_text(
        '{"class_index": 0, "image_index": 0, "attempt": 0, "reason": "constant"}\n'
    )
    texts = [str(problem) for problem in verify(out).problems]
    assert texts == [
        "class 0 has 6 images; run.json says 7",
        "class 1 has 6 images; run.json says 7",
        "rejections.jsonl lists 1 rejections, which are not the 2 of the sidecars",
    ]
    assert repair(out, verify(out)) == []


def test_shards_that_hold_the_same_keys(tmp_path: Path, make: Make) -> None:
    out = make(tmp_path / "d")
    with ShardWriter(out, 1) as writer:
        for sample in range(6):
            writer.write(sample, b"", sample % 2, {"prompt": ""})
    result = verify(out, decode=False)
    assert [str(p) for p in result.problems] == [
        "shard-000001: its first key 000000000 does not follow 000000005 of the shard before it"
    ]


def test_nothing_to_verify(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"classes\.json is missing"):
        verify(tmp_path)
    (tmp_path / "classes.json").write_text("[]")
    with pytest.raises(UserError, match="holds no finished shard"):
        verify(tmp_path)
