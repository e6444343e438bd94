"""ubgen-export as a command: what it shows of an engine, and a disk that is full in the middle of one."""

import json
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ubgen import runtime
from ubgen.cli import export as command
from ubgen.core.errors import UserError
from ubgen.core.stage import MANIFEST
from ubgen.export import Exported, export_engine, load_spec


@pytest.fixture
def options(family: dict[str, str], spec_file: Path, lora: Path) -> list[str]:
    weights = [text for name, path in family.items() for text in (f"--{name.replace('_', '-')}", path)]
    return ["--spec", str(spec_file), "--lora", str(lora), *weights]


@pytest.fixture
def out(exported: Exported, tmp_path: Path) -> Path:
    """The engine once more, to be changed."""
    return Path(shutil.copytree(exported.path, tmp_path / "engine"))


def test_an_engine_that_is_there_is_shown_with_its_parity(
    exported: Exported,
    options: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr("sys.argv", ["ubgen-export", *options, "--out", str(exported.path)])
    command.main()
    text = capsys.readouterr().out
    for row in exported.parity:
        (line,) = [line for line in text.splitlines() if f" {row.network} " in line]
        assert f"{row.error:.2e}" in line
        assert f"{row.tolerance:.0e}" in line
    pipeline = exported.pipeline
    assert f"{pipeline.images} images of the whole pipeline: PSNR {pipeline.psnr:.1f} dB" in text
    assert f"is already this engine; nothing was done (key {exported.key[:19]}" in text
    monkeypatch.setattr("sys.argv", ["ubgen-export", *options, "--out", str(exported.path), "--dry-run"])
    command.main()
    text = capsys.readouterr().out
    assert text.count(", built\n") == len(exported.parity)
    assert "the engine is complete: nothing would be done" in text


def test_an_engine_of_another_version_of_ubgen_runs_and_is_replaced_on_request(
    exported: Exported,
    out: Path,
    options: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    manifest = json.loads((out / MANIFEST).read_text(encoding="utf-8"))
    manifest["engine"]["exporter"] = "sha256:" + "0" * 64
    (out / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    assert runtime.load(out).key == exported.key

    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setattr("sys.argv", ["ubgen-export", *options, "--out", str(out)])
    command.main()
    text = capsys.readouterr().out
    assert "nothing was done" in text
    assert "another version of ubgen made it: --overwrite compiles it again with this one" in text

    monkeypatch.setattr("sys.argv", ["ubgen-export", *options, "--out", str(out), "--overwrite"])
    command.main()
    assert f"{out} written (key" in capsys.readouterr().out
    assert runtime.load(out).key == exported.key
    monkeypatch.setattr("sys.argv", ["ubgen-export", *options, "--out", str(out)])
    command.main()  # now it is this version's
    text = capsys.readouterr().out
    assert "nothing was done" in text
    assert "another version" not in text


@contextmanager
def small_files(limit: int) -> Iterator[None]:
    """A limit on the size of files: writing fails in its middle, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_no_engine_that_passes_for_whole(
    exported: Exported,
    family: dict[str, str],
    spec_file: Path,
    lora: Path,
    out: Path,
    options: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """An engine with one damaged file is built again; the other networks stay, and the next call ends it."""
    with (out / "clip_text.onnx").open("ab") as file:
        file.write(b"!")
    kept = {file.name: file.stat().st_mtime_ns for file in out.glob("*.onnx")}
    monkeypatch.setattr("sys.argv", ["ubgen-export", *options, "--out", str(out)])
    with small_files(100_000), pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "File too large" in errors[0]
    assert not (out / ".building").exists()
    with pytest.raises(UserError, match="unfinished"):
        runtime.load(out)
    assert export_engine(load_spec(spec_file, **family), out, lora).built
    assert len(runtime.load(out)) == len(exported.parity)
    now = {file.name: file.stat().st_mtime_ns for file in out.glob("*.onnx")}
    assert {name for name in now if now[name] != kept.get(name)} == {"clip_text.onnx"}
