"""The stage around the networks: where it writes, who may write there, and names that mean harm."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from ubgen.core.errors import UserError
from ubgen.core.stage import read_manifest, read_run
from ubgen.dataset import ShardWriter, is_marked_synthetic, open_dataset, open_store
from ubgen.dataset.tools.verify import verify
from ubgen.synth import SynthConfig
from ubgen.synth.plan import Item
from ubgen.synth.speed import speed_files
from ubgen.synth.synthesise import synthesise

Settings = Callable[..., SynthConfig]


def make(config: SynthConfig, stand_ins: ModuleType) -> Any:
    return synthesise(config, open_source=lambda *_: stand_ins.FromIdentities())


def shards(out: object) -> dict[str, bytes]:
    store = open_store(str(out))
    return {name: store.read(name) for name in store.names() if name.startswith("shard-")}


@pytest.fixture(scope="module")
def undisturbed(settings: Settings, stand_ins: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    make(settings(out), stand_ins)
    return out


def test_what_it_writes_is_whole(undisturbed: Path) -> None:
    assert verify(undisturbed).problems == []
    samples = open_dataset(undisturbed)
    assert all(is_marked_synthetic(samples.encoded(i)[0]) for i in range(len(samples)))
    assert sum(1 for _ in (undisturbed / "rejections.jsonl").open()) > 5


def test_object_storage_gets_the_same_bytes(
    settings: Settings, stand_ins: ModuleType, undisturbed: Path, url: str
) -> None:
    """Interrupted once; the second run makes only what is missing."""

    class Dies(stand_ins.FromIdentities):  # type: ignore[name-defined, misc]
        def denoise(self, items: Sequence[Item]) -> torch.Tensor:
            time.sleep(0.3)
            if open_store(url).size("shard-000000.json") is not None:
                raise RuntimeError("the device fell off the bus")
            return super().denoise(items)

    with pytest.raises(RuntimeError, match="fell off"):
        synthesise(settings(url), open_source=lambda *_: Dies())
    before = {name for name in open_store(url).names() if name.endswith(".json")}
    assert "manifest.json" not in before
    result = make(settings(url), stand_ins)
    assert result.made < 60
    assert shards(url) == shards(undisturbed)
    assert verify(url).problems == []
    assert make(settings(url), stand_ins).found


@pytest.mark.parametrize("where", ["local", "s3"])
def test_of_two_runs_on_one_directory_the_second_refuses(
    settings: Settings, stand_ins: ModuleType, undisturbed: Path, tmp_path: Path, where: str, url: str
) -> None:
    out = url if where == "s3" else tmp_path / "out"
    begun, go_on = threading.Event(), threading.Event()

    class Waits(stand_ins.FromIdentities):  # type: ignore[name-defined, misc]
        def denoise(self, items: Sequence[Item]) -> torch.Tensor:
            begun.set()
            assert go_on.wait(60)
            return super().denoise(items)

    first = threading.Thread(target=lambda: synthesise(settings(out), open_source=lambda *_: Waits()))
    first.start()
    try:
        assert begun.wait(60)
        for second in (settings(out), settings(out, executor="static", part="1/2")):
            with pytest.raises(UserError, match="in use"):
                make(second, stand_ins)
    finally:
        go_on.set()
        first.join()
    assert shards(out) == shards(undisturbed)


def test_a_damaged_shard_is_found_and_made_again(
    settings: Settings, stand_ins: ModuleType, undisturbed: Path, tmp_path: Path
) -> None:
    from ubgen.dataset.tools.verify import repair

    out = tmp_path / "out"
    make(settings(out), stand_ins)
    tar = out / "shard-000002.tar"
    data = bytearray(tar.read_bytes())
    data[1500] ^= 1
    tar.write_bytes(data)
    found = verify(out)
    assert found.problems
    repair(out, found)
    assert make(settings(out), stand_ins).made == 16
    assert shards(out) == shards(undisturbed)
    assert verify(out).problems == []


def test_names_that_mean_harm_reach_no_path(
    settings: Settings, stand_ins: ModuleType, tmp_path: Path
) -> None:
    names = [
        "../../escape",
        "a/b\\c",
        "<script>alert(1)</script>|`x`",
        "crane\u202egnp.exe",
        "n" * 300,
        "...",
    ]
    classes = tmp_path / "classes.txt"
    classes.write_text("".join(f"id{i}\t{name}\n" for i, name in enumerate(names)), encoding="utf-8")
    out = tmp_path / "deep" / "out"
    make(settings(out, classes=str(classes), per_class=3), stand_ins)
    assert {p.name for p in tmp_path.iterdir()} == {"classes.txt", "deep"}
    assert {p.name for p in (tmp_path / "deep").iterdir()} == {"out"}
    assert [sample.class_name for sample in open_dataset(out)][:6] == names
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "<script>" not in card
    assert "\u202e" not in card
    assert verify(out).problems == []


def test_broken_networks_end_the_run_with_one_line(
    settings: Settings, stand_ins: ModuleType, tmp_path: Path
) -> None:
    class Nan(stand_ins.FromIdentities):  # type: ignore[name-defined, misc]
        def score(self, items: Sequence[Item], latents: torch.Tensor, pixels: torch.Tensor) -> Any:
            scored = super().score(items, latents, pixels)
            return type(scored)(pixels, scored.similarity * torch.nan, *list(vars(scored).values())[2:])

    out = tmp_path / "out"
    with pytest.raises(
        UserError, match=r"class \d, image \d+: none of 10 attempts is good enough .* not finite"
    ):
        synthesise(settings(out), open_source=lambda *_: Nan())
    assert not [p for p in out.iterdir() if "shard" in p.name]


def test_an_image_that_ends_the_run_leaves_its_draws(
    settings: Settings, stand_ins: ModuleType, undisturbed: Path, tmp_path: Path
) -> None:
    """A device that failed for a while: what it left is gone when the run is continued and finished."""

    class Nan(stand_ins.FromIdentities):  # type: ignore[name-defined, misc]
        def score(self, items: Sequence[Item], latents: torch.Tensor, pixels: torch.Tensor) -> Any:
            scored = super().score(items, latents, pixels)
            scored.finite[:] &= torch.tensor([item.position != 37 for item in items])
            return scored

    out = tmp_path / "out"
    with pytest.raises(
        UserError, match=r"class 2, image 7: none of 10 .*exhausted-000000037\.jsonl lists its draws"
    ):
        synthesise(settings(out), open_source=lambda *_: Nan())
    assert not (out / "manifest.json").exists()
    (ledger,) = out.glob("exhausted-*")
    lines = [json.loads(line) for line in ledger.read_text(encoding="utf-8").splitlines()]
    place = {"seed": 0, "class_index": 2, "image_index": 7}
    assert [line["attempt"] for line in lines] == list(range(10))
    assert all(line | place | {"reason": "not finite"} == line for line in lines)
    assert [p.name for p in out.glob("shard-*.json")]  # some were finished, and are kept
    assert make(settings(out), stand_ins).made < 60
    assert shards(out) == shards(undisturbed)
    assert (out / "rejections.jsonl").read_bytes() == (undisturbed / "rejections.jsonl").read_bytes()
    assert set(open_store(out).names()) == set(open_store(undisturbed).names())


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has what is asked for")
def test_the_engines_own_device_is_the_default(
    settings: Settings, stand_ins: ModuleType, undisturbed: Path, tmp_path: Path
) -> None:
    about = {"stage": "export", "engine": {"key": "sha256:none"}, "config": {"spec": {"device": "cuda"}}}
    (tmp_path / "manifest.json").write_text(json.dumps({**about, "inputs": {}}), encoding="utf-8")
    out = tmp_path / "out"
    with pytest.raises(UserError, match="--device cuda: this machine has no CUDA device"):
        make(replace(settings(out), engine=tmp_path), stand_ins)
    assert not out.exists()
    make(replace(settings(out), engine=tmp_path, device="cpu"), stand_ins)
    assert shards(out) == shards(undisturbed)
    assert read_manifest(undisturbed, "synth")["config"]["device"] == "cpu"


@pytest.mark.parametrize("where", ["local", "s3"])
def test_the_manifest_tells_of_all_parts(
    settings: Settings, stand_ins: ModuleType, undisturbed: Path, tmp_path: Path, where: str, url: str
) -> None:
    """The second part fails first, and is then continued; the first is queued twice."""
    out = url if where == "s3" else tmp_path / "out"
    parts = [settings(out, executor="static", part=f"{i}/2") for i in (1, 2)]

    class Fails(stand_ins.FromIdentities):  # type: ignore[name-defined, misc]
        def denoise(self, items: Sequence[Item]) -> torch.Tensor:
            raise RuntimeError("the device fell off the bus")

    with pytest.raises(RuntimeError, match="fell off"):
        synthesise(parts[1], open_source=lambda *_: Fails())
    made = [make(parts[i], stand_ins) for i in (0, 0, 1)]
    assert [(part.made, part.complete) for part in made] == [(32, False), (0, False), (28, True)]
    manifest = read_manifest(str(out), "synth")
    speed = manifest["speed"]
    assert speed["images"] == 60
    assert speed["throughput"][-1][1] == 60
    assert speed["throughput"][-1][0] == pytest.approx(60 / speed["images_per_second"], abs=1e-3)
    assert speed["worker_seconds"] <= speed["throughput"][-1][0] + 0.01  # which is rounded
    assert sum(speed["bottleneck_shares"].values()) == pytest.approx(1)
    assert shards(out) == shards(undisturbed)
    assert set(open_store(str(out)).names()) == set(open_store(undisturbed).names()) - (
        {".lock"} if where == "s3" else set()
    )


HOLD = """
import sys
from ubgen.core.locks import hold
from ubgen.core.files import open_store
with hold(open_store(sys.argv[1]), shared=sys.argv[2] == "local"):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("where", ["local", "s3"])
def test_a_part_waits_for_another_and_takes_over_when_it_dies(
    settings: Settings,
    stand_ins: ModuleType,
    undisturbed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    url: str,
) -> None:
    """The other is a process that holds the directory from when this part has begun, for a minute as this one sees it,
    and then is killed."""
    out = url if where == "s3" else str(tmp_path / "out")
    if where == "local":  # the client of object storage needs the time as it is
        start, clock = time.monotonic(), time.monotonic
        monkeypatch.setattr(time, "monotonic", lambda: start + 20 * (clock() - start))
    others: list[subprocess.Popen[bytes]] = []

    def networks(*_: object) -> Any:
        command = [sys.executable, "-c", HOLD, out, where]
        others.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
        assert others[0].stdout.readline() == b"held\n"  # type: ignore[union-attr]
        return stand_ins.FromIdentities()

    with ThreadPoolExecutor(1) as pool:
        part = pool.submit(synthesise, settings(out, executor="static", part="1/1"), open_source=networks)
        try:
            while not part.done() and open_store(out).size("shard-000003.json") is None:
                time.sleep(0.05)
            with pytest.raises(TimeoutError):
                part.result(timeout=3)
        finally:
            for other in others:
                other.kill()
                other.communicate()
        assert part.result(timeout=60).complete
    assert shards(out) == shards(undisturbed)
    assert verify(out).problems == []


def test_an_error_of_the_part_that_finishes_ends_it(
    settings: Settings, stand_ins: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only a directory in use is tried again: here a second try would do."""

    def fail_once(*_: object) -> None:
        monkeypatch.undo()
        raise UserError("no pictures")

    monkeypatch.setattr("ubgen.synth.synthesise.write_pictures", fail_once)
    part = settings(tmp_path / "out", executor="static", part="1/1")
    with pytest.raises(UserError, match="no pictures"):
        make(part, stand_ins)
    assert make(part, stand_ins).complete


def test_figures_count_until_the_dataset_is_finished(
    settings: Settings, stand_ins: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that ends while it describes the dataset, and one that has nothing left to make; then another dataset."""
    out = tmp_path / "out"

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as context:
        context.setattr("ubgen.synth.synthesise.write_pictures", fail)
        with pytest.raises(OSError, match="No space"):
            make(settings(out), stand_ins)
    assert len(speed_files(open_store(out).names())) == 1
    assert make(settings(out), stand_ins).made == 0
    speed = read_manifest(out, "synth")["speed"]
    assert (speed["images"], speed["throughput"][-1][1]) == (60, 60)
    assert speed_files(open_store(out).names()) == []
    (out / f"speed-{0:032x}.json").write_bytes(b"")
    make(settings(out, per_class=4, overwrite=True), stand_ins)
    assert speed_files(open_store(out).names()) == []
    assert read_manifest(out, "synth")["speed"]["images"] == 20


def test_the_manifest_says_what_made_it(settings: Settings, undisturbed: Path) -> None:
    manifest = read_manifest(undisturbed, "synth")
    assert manifest["engine_key"] == "sha256:none"
    assert manifest["same_bits"] is None  # the engine's manifest does not say
    assert manifest["dataset"] == {"images": 60, "shards": 4, "classes": 5}
    assert manifest["stats"]["class_counts"] == [12] * 5
    card = (undisturbed / "README.md").read_text(encoding="utf-8")
    assert "## Measures" in card
    assert "| label agreement | " in card
    assert read_run(undisturbed, "synth")["--min-similarity"] == -0.5


class Broken(Exception):
    pass


def begin(config: SynthConfig, *, shards: int = 0) -> None:
    """A run that fails when it has made so many shards; those of one image, as the worker makes seven at a time."""

    def fails(*_: object) -> Any:
        raise Broken

    with pytest.raises(Broken):
        synthesise(config, open_source=fails)
    for number in range(shards):
        with ShardWriter(config.out, number, config.format) as writer:
            writer.write(number, np.zeros((8, 8, 3), np.uint8), number, {}, {"quality": 1.0})


def test_a_run_that_made_nothing_is_replaced(settings: Settings, tmp_path: Path) -> None:
    """Unless it is one of several parts, which may be at work on their first shards."""
    begin(settings(tmp_path))
    (tmp_path / "exhausted-000000007.jsonl").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match="--seed was 0, now 1"):
        begin(settings(tmp_path, seed=1, executor="static", part="1/2"))
    assert read_run(tmp_path, "synth")["--seed"] == 0
    begin(settings(tmp_path, seed=1))
    assert read_run(tmp_path, "synth")["--seed"] == 1
    assert not list(tmp_path.glob("exhausted-*"))


def test_overwriting_removes_ours_and_nothing_else(settings: Settings, tmp_path: Path) -> None:
    begin(settings(tmp_path, shard_size=1), shards=2)
    for name in ("notes.txt", "shard-notes.json", "exhausted-000000007.jsonl"):
        (tmp_path / name).write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match=r"an unfinished run .*--seed was 0, now 1"):
        begin(settings(tmp_path, shard_size=1, seed=1))
    begin(settings(tmp_path, shard_size=1, seed=1, overwrite=True))
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        *(".lock", "classes.json", "notes.txt", "run.json", "shard-notes.json")
    ]
