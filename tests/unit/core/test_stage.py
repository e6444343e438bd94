"""Stage directories: whose they are, what differs, what may be cleared, and one writer at a time."""

import errno
import json
import os
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest

from ubgen.core.errors import UserError
from ubgen.core.files import Store, open_store
from ubgen.core.stage import (
    MANIFEST,
    RUN,
    Stage,
    content_hash,
    first_difference,
    read_manifest,
    read_run,
)

SEED = {"seed": 1, "losses": {"quality": 0.5}}
HOLD = """
import sys
from ubgen.core.stage import Stage
with Stage(sys.argv[1], "train", {}, shared="shared" in sys.argv).hold():
    print("held", flush=True)
    sys.stdin.read()
"""


def run(out: Path | str, *, finish: bool = True, identity: Any = SEED, **options: Any) -> str:
    """A run of a stage that writes work.bin; what it found there."""
    stage = Stage(out, "train", identity, owns=("work.*", "checkpoints"), **options)
    with stage.hold():
        if stage.state != "finished":
            stage.begin()
            stage.store.write("work.bin", json.dumps(identity))
            if finish:
                stage.finish({})
    return stage.state


@pytest.fixture(params=["local", "memory"])
def out(request: pytest.FixtureRequest, tmp_path: Path) -> Path | str:
    return tmp_path / "run" if request.param == "local" else f"memory://{uuid.uuid4().hex}/run"


def test_a_finished_stage_says_how_it_was_made(tmp_path: Path) -> None:
    source = tmp_path / "classes.txt"
    source.write_text("cat\n")
    with Stage(tmp_path / "run", "train", SEED, config={"steps": 50}).hold() as stage:
        stage.begin()
        stage.finish({"classes": source}, updates=7)
    manifest = read_manifest(tmp_path / "run", "train")
    assert (manifest["stage"], manifest["config"], manifest["updates"]) == ("train", {"steps": 50}, 7)
    assert manifest["inputs"] == {"classes": {"path": str(source), "hash": content_hash(source)}}
    assert manifest["versions"]["torch"]
    assert manifest["ubgen_version"]
    assert manifest["device"].startswith(("cpu", "cuda"))
    assert read_run(tmp_path / "run", "train") == SEED


@pytest.mark.parametrize(
    ("called", "command"),
    [
        (["/venv/bin/ubgen-train", "--out", "my runs"], "ubgen-train --out 'my runs'"),
        (["/src/ubgen/cli/train.py", "--seed", "1"], "ubgen-train --seed 1"),
        (["/venv/bin/pytest", "-q"], None),
    ],
)
def test_a_manifest_keeps_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, called: list[str], command: str | None
) -> None:
    monkeypatch.setattr("sys.argv", called)
    with Stage(tmp_path / "run", "train", SEED).hold() as stage:
        stage.begin()
        stage.finish({})
    assert read_manifest(tmp_path / "run")["command"] == command


def test_the_same_run_again_finds_itself_unfinished_then_finished(out: Path | str) -> None:
    assert run(out, finish=False) == "new"
    with pytest.raises(UserError, match="is unfinished or not a ubgen train directory"):
        read_manifest(out, "train")
    assert run(out) == "unfinished"
    assert run(out) == "finished"
    assert set(open_store(out).entries()) == {RUN, MANIFEST, "work.bin"}


def test_another_run_is_refused_with_what_differs(out: Path | str) -> None:
    other = {**SEED, "losses": {"quality": 1}}
    run(out, finish=False)
    refused = r"holds {} run with another configuration \(losses.quality was 0.5, now 1\); use the same, .*--overwrite"
    with pytest.raises(UserError, match=refused.format("an unfinished")):
        run(out, identity=other)
    run(out)
    with pytest.raises(UserError, match=refused.format("a finished")):
        run(out, identity=other)
    with pytest.raises(UserError, match=r"now 1\); choose another --out$"):
        run(out, identity=other, overwrite=None)
    assert run(out) == "finished"


def test_overwrite_clears_what_the_stage_wrote_and_nothing_else(out: Path | str) -> None:
    store = open_store(out)
    run(out)
    store.write("checkpoints", "old")
    store.write("notes.txt", "the user's")
    assert run(out, finish=False, overwrite=True, identity={"seed": 2}) == "new"
    assert set(store.entries()) == {RUN, "work.bin", "notes.txt"}
    assert read_run(out, "train") == {"seed": 2}


def test_an_unfinished_run_without_work_gives_way_to_another(out: Path | str) -> None:
    run(out, finish=False)

    def has_work(store: Store) -> bool:
        return store.size("checkpoints") is not None

    assert run(out, identity={"seed": 2}, has_work=has_work) == "new"
    assert read_run(out, "train") == {"seed": 2}
    open_store(out).write("checkpoints", "")
    with pytest.raises(UserError, match="seed was 2, now 1"):
        run(out, has_work=has_work)


def test_a_foreign_directory_is_refused_even_to_overwrite(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for overwrite in (False, True):
        with pytest.raises(UserError, match=r"not a directory of ubgen-train \(it holds photos\)"):
            run(tmp_path, overwrite=overwrite)
    assert [p.name for p in tmp_path.iterdir() if p.name != ".lock"] == ["photos"]
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--out: .*/file is not a directory"):
        Stage(tmp_path / "file", "train", {}).look()


def test_the_directory_of_another_stage_is_refused(tmp_path: Path) -> None:
    with Stage(tmp_path, "export", {}).hold() as stage:
        stage.begin()
        stage.finish({})
    with pytest.raises(UserError, match="not a directory of ubgen-train"):
        run(tmp_path, overwrite=True)
    with pytest.raises(UserError, match="is a ubgen export directory; expected a ubgen train directory"):
        read_manifest(tmp_path, "train")
    with pytest.raises(UserError, match=r"has no run\.json of ubgen-train"):
        read_run(tmp_path, "train")


@pytest.mark.parametrize(
    "files",
    [
        {"config.json": "{}"},
        {"export.json": "{}"},
        {"convert.json": "{}"},
        {"run.json": '{"engine key": "k", "--seed": 0}'},
    ],
    ids=["train", "export", "convert", "synth"],
)
def test_what_a_former_version_began_cannot_be_continued(tmp_path: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    for overwrite in (False, True):
        with pytest.raises(UserError, match="was begun by an earlier version of ubgen"):
            run(tmp_path, overwrite=overwrite)


def test_what_a_former_version_finished_can_be_overwritten(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text('{"stage": "train"}')
    with pytest.raises(UserError, match=r"was finished by an earlier version of ubgen; .*--overwrite"):
        run(tmp_path)
    assert run(tmp_path, overwrite=True) == "new"


def test_a_missing_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere is unfinished or not a ubgen train directory"):
        read_manifest(tmp_path / "nowhere", "train")


@pytest.mark.parametrize("content", ["{", "[]", '{"a": 1}', "\x00"])
def test_a_broken_manifest_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / MANIFEST).write_text(content)
    with pytest.raises(UserError, match=MANIFEST):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        ({"a": [1, {"b": 2}]}, {"a": [1, {"b": 3}]}, "a[1].b was 2, now 3"),
        ({"a": [1]}, {"a": [1, 2]}, "a had 1 entries, now 2"),
        ({"a": 1}, {"a": 1, "b": "x"}, "b was absent, now 'x'"),
        ({"a": "sha256:" + "0" * 64}, {}, "a was sha256:000000000000…, now absent"),
        ({"a": {"b": [1.0]}}, {"a": {"b": [1]}}, None),
    ],
)
def test_the_first_difference(old: Any, new: Any, text: str | None) -> None:
    assert first_difference(old, new) == text


def enter(out: Path | str, **options: Any) -> None:
    with Stage(out, "train", {}, **options).hold():
        pass


def test_an_output_directory_in_use_is_refused_until_its_process_ends(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match="output directory in use"):
        enter(tmp_path)
    holder.kill()  # even killed, it leaves no stale lock
    holder.communicate()
    enter(tmp_path)


def test_shared_writers_keep_out_one_that_wants_the_directory_alone(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path), "shared"]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with Stage(tmp_path, "train", {}, shared=True).hold() as stage:
        with pytest.raises(RuntimeError, match="cannot be finished"):
            stage.finish({})
        with pytest.raises(UserError, match="output directory in use"):
            enter(tmp_path)
    with pytest.raises(UserError, match="output directory in use"):
        enter(tmp_path)
    holder.communicate("")
    with Stage(tmp_path, "train", {}).hold():
        with pytest.raises(UserError, match="output directory in use"):
            enter(tmp_path, shared=True)
        with pytest.raises(ValueError, match="alone"):
            enter(tmp_path, shared=True, overwrite=True)


def test_what_killed_writers_left_goes_with_the_next_one_that_is_alone(tmp_path: Path) -> None:
    left = tmp_path / ".shard-000000.tar.ab_12345.tmp"
    left.touch()
    for shared in (True, False):
        with Stage(tmp_path, "synth", {}, shared=shared).hold() as stage:
            stage.begin()
            assert left.exists() == shared


def test_a_stage_in_object_storage(tmp_path: Path) -> None:
    url = f"memory://{tmp_path.name}/run"
    with Stage(url, "synth", {}).hold() as stage:
        with pytest.raises(UserError, match="ubgen-synth writes to a local directory only"):
            _ = stage.path
        with pytest.raises(UserError, match=f"process {os.getpid()} on .* is writing to {url}"):
            enter(url)


def test_an_output_path_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write to output directory .*/file/run"):
        enter(tmp_path / "file" / "run")


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a file system that root cannot write to")
def test_a_read_only_place_is_refused() -> None:
    with pytest.raises(UserError, match="cannot write to output directory /proc/self"):
        enter(Path("/proc/self"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_directory_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    with pytest.raises(UserError, match="cannot write to output directory"):
        enter(tmp_path)


def test_a_file_system_that_cannot_lock_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", no_locks)
    named = rf"{tmp_path}: its file system cannot lock files \(No locks available\)"
    with pytest.raises(UserError, match=named):
        enter(tmp_path)


def test_content_hash_of_a_directory_depends_on_names_and_bytes_alone(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name / "deep").mkdir(parents=True)
        (tmp_path / name / "deep" / "a").write_bytes(b"x")
        (tmp_path / name / "b").write_bytes(b"y")
    os.utime(tmp_path / "two" / "b", (0, 0))
    first = content_hash(tmp_path / "one")
    assert first.startswith("sha256:")
    assert first == content_hash(tmp_path / "two")
    (tmp_path / "two" / "b").rename(tmp_path / "two" / "c")
    assert first != content_hash(tmp_path / "two")
    (tmp_path / "one" / "b").write_bytes(b"z")
    assert first != content_hash(tmp_path / "one")


def test_content_hash_of_a_directory_leaves_out_what_no_stage_reads(tmp_path):
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_bytes(b"{}")
    first = content_hash(tmp_path)
    for name in ("README.md", ".gitattributes", ".git/config", "unet/.cache/huggingface/download.lock"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert content_hash(tmp_path) == first
    (tmp_path / "unet" / "extra.json").write_bytes(b"{}")
    assert content_hash(tmp_path) != first


def test_content_hash_follows_links_to_the_bytes_that_are_read(tmp_path):
    for name in ("plain", "linked", "shared"):
        (tmp_path / name).mkdir()
    (tmp_path / "shared" / "vae").mkdir()
    (tmp_path / "plain" / "vae").mkdir()
    for place in (tmp_path / "plain" / "vae" / "w", tmp_path / "shared" / "vae" / "w"):
        place.write_bytes(b"x")
    (tmp_path / "linked" / "vae").symlink_to(tmp_path / "shared" / "vae")
    first = content_hash(tmp_path / "linked")
    assert first == content_hash(tmp_path / "plain")
    (tmp_path / "shared" / "vae" / "w").write_bytes(b"y")
    assert content_hash(tmp_path / "linked") != first
    (tmp_path / "linked" / "loop").symlink_to(tmp_path / "linked")
    with pytest.raises(UserError, match="linked/loop is a link to a directory above it"):
        content_hash(tmp_path / "linked")
    (tmp_path / "linked" / "loop").unlink()
    (tmp_path / "linked" / "gone").symlink_to(tmp_path / "nothing")
    with pytest.raises(UserError, match="linked/gone is a link to a file that does not exist"):
        content_hash(tmp_path / "linked")


def test_content_hash_of_a_known_file(tmp_path):
    (tmp_path / "f").write_bytes(b"abc")
    # FIPS 180-2, appendix B.1
    wanted = "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert content_hash(tmp_path / "f") == wanted


def test_content_hash_of_nothing_is_the_users_mistake(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        content_hash(tmp_path / "nothing")
