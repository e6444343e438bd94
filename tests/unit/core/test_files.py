"""Directories of files: local ones and those behind fsspec behave alike, and a file is there only when it is whole."""

import json
import os
import pickle
import shutil
import stat
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ubgen.core.errors import UserError
from ubgen.core.files import Store, atomic_write, open_store

NAMES = st.sampled_from(["a", "b.json", ".lock", "shard-000000.tar"])
STEPS = st.one_of(
    st.tuples(st.just("write"), NAMES, st.binary(max_size=50)),
    st.tuples(st.just("new_file"), NAMES, st.binary(max_size=50)),
    st.tuples(st.just("abandon"), NAMES, st.binary(max_size=50)),
    st.tuples(st.just("delete"), NAMES, st.just(b"")),
)


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return open_store(tmp_path if request.param == "local" else f"memory://{uuid.uuid4().hex}/d")


def act(store: Store, what: str, name: str, data: bytes) -> None:
    if what == "write":
        store.write(name, data)
    elif what == "delete":
        store.delete(name)
    elif what == "new_file":
        with store.new_file(name) as file:
            file.write(data)
    else:
        abandon(store, name, data)


def abandon(store: Store, name: str, data: bytes) -> None:
    try:
        with store.new_file(name) as file:
            file.write(data)
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass


def expected(steps: list[tuple[str, str, bytes]]) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    for what, name, data in steps:
        if what == "delete":
            files.pop(name, None)
        elif what in ("write", "new_file"):
            files[name] = data
    return files


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(STEPS, max_size=8), start=st.integers(0, 60), count=st.integers(0, 60))
@pytest.mark.parametrize("kind", ["local", "memory"])
def test_a_store_is_a_dictionary_of_files(
    kind: str,
    tmp_path_factory: pytest.TempPathFactory,
    steps: list[tuple[str, str, bytes]],
    start: int,
    count: int,
) -> None:
    where = tmp_path_factory.mktemp("d") if kind == "local" else f"memory://{uuid.uuid4().hex}"
    store = open_store(where)
    for step in steps:
        act(store, *step)
    files = expected(steps)
    assert store.sizes() == {name: len(data) for name, data in files.items()}
    assert store.names() == sorted(files)
    assert store.read_starts(list(files), count) == [data[:count] for data in files.values()]
    for name, data in files.items():
        assert (store.read(name), store.size(name)) == (data, len(data))
        assert store.read_range(name, start, start + count) == data[start : start + count]
        with store.open(name) as file:
            file.seek(start)
            assert file.read(count) == data[start : start + count]


def test_what_is_not_there(store: Store) -> None:
    assert (store.size("x"), store.read_starts(["x"], 5)) == (None, [b""])
    for read in (store.read, store.open, lambda name: store.read_range(name, 0, 1)):
        with pytest.raises(FileNotFoundError) as failure:
            read("x")
        assert failure.value.filename == store.address("x")
    nowhere = open_store(f"{store}/nowhere")
    assert (nowhere.names(), nowhere.size("x")) == ([], None)


def test_directories_are_no_files_and_stores_travel(store: Store) -> None:
    if store.local_path:
        (store.local_path / "below").mkdir()
    open_store(f"{store}/below").write("x", "é")
    store.write("y", "é")
    copy = pickle.loads(pickle.dumps(store))
    assert (copy.url, copy.sizes()) == (store.url, {"y": 2})


@pytest.mark.parametrize(
    ("where", "url"),
    [
        ("s3://bucket/a/b/", "s3://bucket/a/b"),
        (Path("s3://bucket/a"), "s3://bucket/a"),
        ("memory://x", "memory://x"),
        ("file:///data/x", "/data/x"),
        (Path("/data/x"), "/data/x"),
        ("./s3:/x", "s3:/x"),
        ("odd:name/x", "odd:name/x"),
        ("C:/x", "C:/x"),
    ],
)
def test_paths_and_urls_are_told_apart(where: str | Path, url: str) -> None:
    store = open_store(where)
    assert str(store) == url
    assert store.address("f") == f"{url}/f"
    assert (store.local_path is None) == ("://" in url)
    assert open_store(store) is store


def test_an_unknown_protocol_and_a_missing_package() -> None:
    with pytest.raises(UserError, match="nope://x: Protocol not known: nope"):
        open_store("nope://x")
    program = (
        "import sys; sys.modules['s3fs'] = None\n"
        "from ubgen.core.files import open_store\n"
        "open_store('s3://bucket/x')"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (
        answer.stderr.splitlines()[-1]
        == "ubgen.core.errors.UserError: s3://bucket/x: pip install -c constraints.txt -e '.[s3]'"
    )


def test_the_format_opens_without_the_optional_packages() -> None:
    program = (
        "import sys, ubgen.dataset\n"
        "print([m for m in ('fsspec', 's3fs', 'pyarrow', 'datasets', 'ray', 'torch') if m in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert answer.stdout == "[]\n"


def test_a_local_file_has_the_usual_rights(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        open_store(tmp_path).write("f", b"x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "f").stat().st_mode) == 0o640


def test_leftovers_of_killed_writers_go_and_nothing_else(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys; from ubgen.core.files import open_store\n"
        "with open_store(sys.argv[1]).new_file('shard-000000.tar') as file:\n"
        "    file.write(b'x' * 3_000_000); os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False)
    assert len(list(tmp_path.iterdir())) == 1
    for name in ("notes.tmp", ".hidden", ".a.tmp"):
        (tmp_path / name).touch()
    open_store(tmp_path).delete_leftovers()
    assert open_store(tmp_path).names() == [".a.tmp", ".hidden", "notes.tmp"]


FILL = """
import sys
from ubgen.dataset import ShardWriter, finished_shards
with ShardWriter(sys.argv[1], 0) as writer:
    writer.write(0, bytes(1000), 0, {})
try:
    with ShardWriter(sys.argv[1], 1) as writer:
        for position in range(1000):
            writer.write(position, bytes(10_000), 0, {})
except OSError as error:
    print(error)
print(sorted(finished_shards(sys.argv[1])), *__import__("os").listdir(sys.argv[1]))
"""


def on_a_mount(options: str, directory: Path, program: str) -> list[str]:
    """What `program` prints with a small file system at `directory`, mounted for this child process alone."""
    if shutil.which("unshare") is None:
        pytest.skip("needs unshare(1), to mount a small file system")
    mount = f'mount -t tmpfs -o {options} none "$1" && exec "$2" -c "$3" "$1"'
    command = ["unshare", "-rm", "sh", "-c", mount, "sh", str(directory), sys.executable, program]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if not answer.stdout and ("unshare" in answer.stderr or "mount" in answer.stderr):
        pytest.skip(f"cannot mount a file system here: {answer.stderr.strip()}")
    return answer.stdout.splitlines()


def test_a_full_disk_keeps_the_finished_shards(tmp_path: Path) -> None:
    error, left = on_a_mount("size=512k", tmp_path, FILL)
    assert error == f"[Errno 28] No space left on device: '{tmp_path}/shard-000001.tar'"
    assert left.startswith("[0] ")
    assert sorted(left.split()[1:]) == [f"shard-000000.{ending}" for ending in ("idx", "json", "tar")]


def test_a_read_only_file_system_is_named(tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "from ubgen.dataset import ShardWriter\n"
        "from ubgen.core.stage import Stage\n"
        "for enter in (lambda: Stage(sys.argv[1], 'synth', {}).hold(), lambda: ShardWriter(sys.argv[1], 0)):\n"
        "    try:\n"
        "        enter().__enter__()\n"
        "    except Exception as error:\n"
        "        print(error)"
    )
    stage, shard = on_a_mount("ro", tmp_path, program)
    assert stage == f"cannot write to output directory {tmp_path}: Read-only file system"
    assert shard.startswith(f"[Errno 30] Read-only file system: '{tmp_path}/.shard-000000.tar.")


def test_a_file_that_cannot_grow_keeps_the_finished_shards(tmp_path: Path) -> None:
    """A file-size limit stands in for the full disk where none can be mounted."""
    limit = (
        "import resource, signal\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", limit + FILL, str(tmp_path)], capture_output=True, text=True, check=True
    )
    error, left = answer.stdout.splitlines()
    assert error == f"[Errno 27] File too large: '{tmp_path}/shard-000001.tar'"
    assert sorted(left.split()[1:]) == [f"shard-000000.{ending}" for ending in ("idx", "json", "tar")]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_directory_names_the_file(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    with pytest.raises(PermissionError, match=str(tmp_path)):
        open_store(tmp_path).write("f", b"x")


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
        "import resource, signal, sys; from pathlib import Path; from ubgen.core.files import atomic_write\n"
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
