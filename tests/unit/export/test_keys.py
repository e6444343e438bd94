"""What an engine is made from, and where it may be written."""

import os
import shutil
from pathlib import Path

import pytest

from ubgen.core.config import resolve_path
from ubgen.core.errors import UserError
from ubgen.core.stage import Stage
from ubgen.export import export_engine, load_spec, plan_export
from ubgen.export.keys import require_own_directory


def contents(directory: Path) -> dict[str, bytes]:
    return {
        file.relative_to(directory).as_posix(): file.read_bytes()
        for file in directory.rglob("*")
        if file.is_file()
    }


@pytest.mark.parametrize("out", ["models", "models/clip", "models/clip/engine", "link", "models/../models"])
def test_an_export_never_touches_the_weights(tmp_path: Path, out: str) -> None:
    models = tmp_path / "models"
    shutil.copytree(resolve_path("ubgen:miniature/weights/clip"), models / "clip")
    (tmp_path / "link").symlink_to(models)
    before = contents(models)
    spec = load_spec("miniature", clip=str(models / "clip"))
    for attempt in (export_engine, plan_export):
        with pytest.raises(UserError, match=r"--out: .* and --clip \(.*\) overlap"):
            attempt(spec, tmp_path / out)
    with pytest.raises(UserError, match="overlap"):
        export_engine(spec, tmp_path / out, overwrite=True)
    assert contents(models) == before


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("there", ["clip/notes.txt", "unet.safetensors", "tokenizer/vocab.json"])
def test_a_foreign_directory_stays_as_it_is(tmp_path: Path, there: str, overwrite: bool) -> None:
    file = tmp_path / there
    file.parent.mkdir(exist_ok=True)
    file.write_text("mine")
    with pytest.raises(
        UserError, match=rf"is not a directory of ubgen-export \(it holds {there.split('/')[0]}\)"
    ):
        export_engine(load_spec("miniature"), tmp_path, overwrite=overwrite)
    assert contents(tmp_path) == {there: b"mine"}


def finished(out: Path, stage: str) -> None:
    run = Stage(out, stage, {})
    with run.hold():
        run.begin()
        (out / "unet.onnx").touch()
        run.finish({})


def test_another_stages_directory_is_refused(tmp_path: Path) -> None:
    finished(tmp_path, "synth")
    with pytest.raises(UserError, match="is not a directory of ubgen-export"):
        require_own_directory(tmp_path, {})


def test_engines_finished_or_not_and_empty_directories_are_taken(tmp_path: Path) -> None:
    require_own_directory(tmp_path / "new", {})
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / ".lock").touch()
    require_own_directory(tmp_path / "empty", {})
    finished(tmp_path / "engine", "export")
    require_own_directory(tmp_path / "engine", {})
    (tmp_path / "engine" / "manifest.json").unlink()
    require_own_directory(tmp_path / "engine", {"lora": tmp_path / "train" / "lora.safetensors"})


def test_an_unfinished_engine_of_an_earlier_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "export.json").write_text('{"stage": "export"}')
    with pytest.raises(UserError, match="was begun by an earlier version of ubgen"):
        require_own_directory(tmp_path, {})


def test_a_lora_inside_is_an_input_too(tmp_path: Path) -> None:
    lora = tmp_path / "pytorch_lora_weights.safetensors"
    with pytest.raises(UserError, match=r"and --lora \(.*\) overlap"):
        require_own_directory(tmp_path, {"lora": lora})
    require_own_directory(tmp_path / "engine", {"lora": lora})


def test_relative_paths_are_compared_by_where_they_lead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="overlap"):
        require_own_directory(Path(os.curdir), {"clip": tmp_path / "clip"})
