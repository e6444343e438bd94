"""Where an engine may be written. What lies there already belongs to somebody."""

import json
import os
import shutil
from pathlib import Path

import pytest

from ubgen.core.config import resolve_path
from ubgen.core.errors import UserError
from ubgen.core.stage import stage_directory
from ubgen.export import export_engine, load_spec, plan_export
from ubgen.export.place import MARK, mark, require_place


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
def test_a_directory_of_somebody_else_stays_as_it_is(tmp_path: Path, there: str, overwrite: bool) -> None:
    file = tmp_path / there
    file.parent.mkdir(exist_ok=True)
    file.write_text("mine")
    with pytest.raises(UserError, match=rf"--out: .* holds something else \({there.split('/')[0]}\)"):
        export_engine(load_spec("miniature"), tmp_path, overwrite=overwrite)
    assert contents(tmp_path) == {there: b"mine"}


def test_another_stages_directory_is_no_place(tmp_path: Path) -> None:
    with stage_directory(tmp_path, "synth", {}) as stage:
        stage.finish({})
    with pytest.raises(UserError, match=r"holds something else \(manifest\.json\)"):
        require_place(tmp_path, {})


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"stage": "train"}'])
def test_a_mark_is_ours_or_none(tmp_path: Path, content: str) -> None:
    (tmp_path / MARK).write_text(content)
    with pytest.raises(UserError, match=r"holds something else \(export\.json\)"):
        require_place(tmp_path, {})


def test_engines_finished_or_not_and_empty_directories_are_places(tmp_path: Path) -> None:
    require_place(tmp_path / "new", {})
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / ".lock").touch()
    require_place(tmp_path / "empty", {})
    with stage_directory(tmp_path / "finished", "export", {}) as stage:
        (tmp_path / "finished" / "unet.onnx").touch()
        stage.finish({})
    require_place(tmp_path / "finished", {})
    (tmp_path / "begun").mkdir()
    mark(tmp_path / "begun", {"spec": {"device": "cpu"}})
    (tmp_path / "begun" / "unet.onnx").touch()
    require_place(tmp_path / "begun", {"lora": tmp_path / "train" / "lora.safetensors"})
    assert json.loads((tmp_path / "begun" / MARK).read_text())["spec"] == {"device": "cpu"}


def test_a_lora_inside_is_an_input_too(tmp_path: Path) -> None:
    lora = tmp_path / "pytorch_lora_weights.safetensors"
    with pytest.raises(UserError, match=r"and --lora \(.*\) overlap"):
        require_place(tmp_path, {"lora": lora})
    require_place(tmp_path / "engine", {"lora": lora})


def test_relative_paths_are_compared_by_where_they_lead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="overlap"):
        require_place(Path(os.curdir), {"clip": tmp_path / "clip"})
