"""Stage directories: unfinished ones are not read, finished ones are not overwritten, and one writer at a time."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ubgen.core.errors import UserError
from ubgen.core.files import open_store
from ubgen.core.stage import MANIFEST, atomic_write, content_hash, read_manifest, stage_directory

HOLD = """
import sys
from pathlib import Path
from ubgen.core.stage import stage_directory
with stage_directory(Path(sys.argv[1]), "train", {}, shared="shared" in sys.argv):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_finished_stage_says_how_it_was_made(tmp_path):
    source = tmp_path / "classes.txt"
    source.write_text("cat\n")
    with stage_directory(tmp_path / "run", "train", {"steps": 50}) as stage:
        stage.finish({"classes": source}, updates=7)
    manifest = read_manifest(tmp_path / "run", "train")
    assert manifest["stage"] == "train"
    assert manifest["config"] == {"steps": 50}
    assert manifest["inputs"] == {"classes": {"path": str(source), "hash": content_hash(source)}}
    assert manifest["updates"] == 7
    assert manifest["versions"]["torch"]
    assert manifest["ubgen_version"]
    assert manifest["device"].startswith(("cpu", "cuda"))


def test_an_unfinished_stage_is_not_read_and_can_be_entered_again(tmp_path):
    with stage_directory(tmp_path, "train", {}) as stage:
        (stage.path / "half").write_text("work")
    with pytest.raises(UserError, match="is unfinished or not a ubgen train directory"):
        read_manifest(tmp_path, "train")
    with stage_directory(tmp_path, "train", {}) as stage:
        assert (stage.path / "half").read_text() == "work"


def test_a_finished_stage_is_kept_unless_told(tmp_path):
    with stage_directory(tmp_path, "train", {}) as stage:
        stage.finish({})
    with (
        pytest.raises(UserError, match=r"already finished.*--overwrite"),
        stage_directory(tmp_path, "train", {}),
    ):
        pass
    read_manifest(tmp_path)
    with stage_directory(tmp_path, "train", {}, overwrite=True), pytest.raises(UserError, match="unfinished"):
        read_manifest(tmp_path)


def test_another_stages_directory_is_refused(tmp_path):
    with stage_directory(tmp_path, "train", {}) as stage:
        stage.finish({})
    with pytest.raises(UserError, match="is a ubgen train directory; expected a ubgen export directory"):
        read_manifest(tmp_path, "export")


def test_a_missing_directory_is_refused(tmp_path):
    with pytest.raises(UserError, match="nowhere is unfinished or not a ubgen train directory"):
        read_manifest(tmp_path / "nowhere", "train")


@pytest.mark.parametrize("content", ["{", "[]", '{"a": 1}', "\x00"])
def test_a_broken_manifest_is_refused(tmp_path, content):
    (tmp_path / MANIFEST).write_text(content)
    with pytest.raises(UserError, match=MANIFEST):
        read_manifest(tmp_path)


def test_an_output_directory_in_use_is_refused_until_its_process_ends(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match="output directory in use"), stage_directory(tmp_path, "train", {}):
        pass
    holder.kill()  # even killed, it leaves no stale lock
    holder.communicate()
    with stage_directory(tmp_path, "train", {}) as stage:
        stage.finish({})


def test_shared_writers_keep_out_one_that_wants_the_directory_alone(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path), "shared"]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with stage_directory(tmp_path, "train", {}, shared=True) as stage:
        with pytest.raises(RuntimeError, match="cannot be finished"):
            stage.finish({})
        with (
            pytest.raises(UserError, match="output directory in use"),
            stage_directory(tmp_path, "train", {}),
        ):
            pass
    with pytest.raises(UserError, match="output directory in use"), stage_directory(tmp_path, "train", {}):
        pass
    holder.communicate("")
    with stage_directory(tmp_path, "train", {}):
        with (
            pytest.raises(UserError, match="output directory in use"),
            stage_directory(tmp_path, "train", {}, shared=True),
        ):
            pass
        with (
            pytest.raises(ValueError, match="alone"),
            stage_directory(tmp_path, "train", {}, shared=True, overwrite=True),
        ):
            pass


def test_what_killed_writers_left_goes_with_the_next_one_that_is_alone(tmp_path):
    left = tmp_path / ".shard-000000.tar.ab_12345.tmp"
    left.touch()
    with stage_directory(tmp_path, "synth", {}, shared=True):
        assert left.exists()
    with stage_directory(tmp_path, "synth", {}):
        assert not left.exists()


def test_a_stage_in_object_storage(tmp_path):
    url = f"memory://{tmp_path.name}/run"
    with stage_directory(url, "synth", {"seed": 1}) as stage:
        with pytest.raises(UserError, match="ubgen synth writes to a local directory only"):
            _ = stage.path
        with pytest.raises(UserError, match=f"process {os.getpid()} on .* is writing to {url}"):
            stage_directory(url, "synth", {}).__enter__()
        stage.finish({})
    assert read_manifest(url, "synth")["config"] == {"seed": 1}
    assert open_store(url).names() == [MANIFEST]
    with pytest.raises(UserError, match=f"{url} is already finished"), stage_directory(url, "synth", {}):
        pass
    with stage_directory(url, "synth", {}, overwrite=True), pytest.raises(UserError, match="unfinished"):
        read_manifest(url)


def test_an_output_path_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match=r"cannot write to output directory .*/file/run"),
        stage_directory(tmp_path / "file" / "run", "train", {}),
    ):
        pass


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a file system that root cannot write to")
def test_a_read_only_place_is_refused():
    with (
        pytest.raises(UserError, match="cannot write to output directory /proc/self"),
        stage_directory(Path("/proc/self"), "train", {}),
    ):
        pass


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_directory_is_refused(tmp_path):
    tmp_path.chmod(0o555)
    with (
        pytest.raises(UserError, match="cannot write to output directory"),
        stage_directory(tmp_path, "train", {}),
    ):
        pass


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


def test_atomic_write_replaces_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "f.json"
    atomic_write(path, json.dumps({"a": 1}))
    atomic_write(path, b"new")
    assert path.read_bytes() == b"new"
    assert [p.name for p in tmp_path.iterdir()] == ["f.json"]


def test_a_full_disk_leaves_the_old_content(tmp_path):
    """A file-size limit stands in for the full disk: the write fails in its middle, as it does there."""
    path = tmp_path / "f"
    path.write_text("old")
    program = (
        "import resource, signal, sys; from pathlib import Path; from ubgen.core.stage import atomic_write\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "atomic_write(Path(sys.argv[1]), b'x' * 100_000)"
    )
    answer = subprocess.run(
        [sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=False
    )
    assert answer.returncode == 1
    assert "File too large" in answer.stderr
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_a_file_system_that_cannot_lock_is_named(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", no_locks)
    with (
        pytest.raises(
            UserError, match=rf"{tmp_path}: its file system cannot lock files \(No locks available\)"
        ),
        stage_directory(tmp_path, "train", {}),
    ):
        pass
