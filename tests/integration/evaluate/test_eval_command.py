"""ubgen-eval from the command line, on the miniature's benchmarks."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from ubgen.cli.eval import main
from ubgen.core.errors import UserError
from ubgen.evaluate.results import all_stored, predictions
from ubgen.miniature.benchmarks import WriteConfig, write

FEW = ["--seeds", 2, "--trials", 2]
EVERYTHING = {
    *(f"{kind}-novel-{task}" for kind in ("transfer", "fewshot") for task in ("class", "count")),
    *("bias-cue-conflict", "bias-focus", "bias-in9", "val-val-fair", "val-val-biased"),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All benchmarks, of which `all` takes two transfer tasks."""
    out = tmp_path_factory.mktemp("data") / "benchmarks"
    write(WriteConfig(write="benchmarks", out=out, scale=0.02))
    suite = json.loads((out / "benchmarks.json").read_text())
    assert len(suite["transfer"]) == 6
    (out / "benchmarks.json").write_text(json.dumps({**suite, "transfer": ["novel-class", "novel-count"]}))
    return out


def checkpoint(path: Path, seed: int) -> str:
    torch.manual_seed(seed)
    save_file(timm.create_model("test_resnet", num_classes=10).state_dict(), path)
    return f"timm:test_resnet@{path}"


@pytest.fixture(scope="module")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    directory = tmp_path_factory.mktemp("backbones")
    return [checkpoint(directory / f"{seed}.safetensors", seed) for seed in (0, 1)]


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["ubgen-eval", *map(str, arguments)])
    main()


def options(backbone: str, root: Path, out: Path) -> list[object]:
    return [
        "--backbone",
        backbone,
        "--data",
        root,
        "--out",
        out,
        "--classes",
        "miniature",
        "--image-size",
        64,
    ]


Failing = Callable[..., str]


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Failing:
    """Calls the command, which must fail; gives what it says."""

    def of(*arguments: object) -> str:
        with pytest.raises(SystemExit):
            call(monkeypatch, *arguments)
        return capsys.readouterr().err

    return of


@pytest.fixture(scope="module")
def outs(root: Path, backbones: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """`all` for two backbones."""
    directory = tmp_path_factory.mktemp("eval")
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name, backbone in zip(("one", "two"), backbones, strict=True):
            call(monkeypatch, "all", *options(backbone, root, directory / name), *FEW)
    return [directory / "one", directory / "two"]


def test_all_measures_everything(outs: list[Path]) -> None:
    results = {result.name: result for result in all_stored(outs[0])}
    assert set(results) == EVERYTHING
    for name, result in results.items():
        columns = predictions(outs[0], name)
        assert {"sample", "label", "predicted", "correct"} <= set(columns)
        assert len({len(column) for column in columns.values()}) == 1
        assert result.counts
    for name in ("results.json", "results.md", "fewshot.png", "manifest.json"):
        assert (outs[0] / name).stat().st_size > 0
    lists = json.loads((outs[0] / "splits/transfer-novel-class.json").read_text())
    assert set(lists["val, seed 0"]) < set(lists["trainval"])


def test_a_killed_run_continues_to_the_same_figures(
    outs: list[Path], root: Path, backbones: list[str], tmp_path: Path
) -> None:
    command = [
        sys.executable,
        "-m",
        "ubgen.cli.eval",
        "all",
        *map(str, [*options(backbones[0], root, tmp_path / "one"), *FEW]),
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("transfer on novel-count"):
            process.kill()
            break
    process.wait()
    done = {path.stem for path in (tmp_path / "one/figures").glob("*.json")}
    assert "transfer-novel-class" in done < EVERYTHING
    subprocess.run(command, check=True, capture_output=True)
    assert (tmp_path / "one/results.json").read_bytes() == (outs[0] / "results.json").read_bytes()


def test_backbones_are_compared(outs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call(monkeypatch, "compare", *outs, "--out", tmp_path / "compared")
    text = (tmp_path / "compared/compare.md").read_text()
    assert "|  | one | two |" in text or "| | one | two |" in text
    assert "differences to one" in text
    assert "novel-class 10 %" in text
    assert (tmp_path / "compared/fewshot.png").is_file()


def test_all_missing_datasets_are_named_at_once(
    root: Path, backbones: list[str], tmp_path: Path, failing: Failing
) -> None:
    (tmp_path / "data").mkdir()
    error = failing("all", *options("no/such/backbone", tmp_path / "data", tmp_path / "out"))
    for name in ("aircraft", "sun397", "cue-conflict", "focus", "in9", "imagenet"):
        assert name in error
    assert not (tmp_path / "out").exists()


def test_a_directory_of_another_backbone_is_kept(
    outs: list[Path], root: Path, backbones: list[str], failing: Failing
) -> None:
    before = (outs[0] / "results.json").read_bytes()
    error = failing("bias", *options(backbones[1], root, outs[0]))
    assert "another configuration (backbone was" in error
    assert (outs[0] / "results.json").read_bytes() == before


def test_a_damaged_image_ends_with_one_line_and_keeps_the_rest(
    root: Path, backbones: list[str], tmp_path: Path, failing: Failing
) -> None:
    shutil.copytree(root, tmp_path / "data")
    broken = next((tmp_path / "data/novel-count/test").rglob("*.png"))
    broken.write_bytes(broken.read_bytes()[:100])
    run = options(backbones[0], tmp_path / "data", tmp_path / "out")
    error = failing("transfer", *run, "--seeds", 1)
    assert error.splitlines()[-1].startswith(f"error: {broken}")
    assert [result.dataset for result in all_stored(tmp_path / "out")] == ["novel-class"]


def test_wrong_options_are_one_line(
    root: Path, backbones: list[str], tmp_path: Path, failing: Failing
) -> None:
    for more, said in (
        (["--datasets", "nothing"], "none of aircraft"),
        (["--datasets", "novel-class", "--splits", "paper"], "the paper has no dataset 'novel-class'"),
        (["--seeds", 0], "--seeds must be at least 1"),
        (["--batch-size", 0], "--batch-size must be positive"),
    ):
        assert said in failing("transfer", *options(backbones[0], root, tmp_path / "out"), *more)
    with pytest.raises(UserError, match="no result"):
        all_stored(tmp_path / "out")
