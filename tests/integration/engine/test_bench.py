"""ubgen-bench engine: every part is timed on both sides, and the figures are written down."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

from ubgen.benchmark import bench_engine, bench_synth
from ubgen.cli import bench
from ubgen.core.errors import UserError
from ubgen.export import Exported, export_engine, load_spec

PARTS = ["text_encoder", "unet", "vae_decoder", "clip_image", "clip_text", "qalign", "denoise", "pipeline"]


def test_both_sides_of_every_part_are_timed(exported: Exported) -> None:
    result = bench_engine(exported.path, batch=2, seconds=0.05, steps=3)
    assert [(row.part, row.side) for row in result.rows] == [
        (part, side) for part in PARTS for side in ("engine", "eager")
    ]
    assert all(row.batch == 2 and row.timing.median > 0 for row in result.rows)
    assert result.settings["key"] == exported.key
    (agreement,) = result.notes
    share = re.fullmatch(r"Pixel values of the two pipelines within one grey level: ([\d.]+)%\.", agreement)
    assert share is not None
    assert float(share[1]) > 99.9


@pytest.mark.gpu
def test_an_engine_on_a_gpu_is_timed_to_the_end(
    spec_file: Path, family: dict[str, str], tmp_path: Path
) -> None:
    text = f'extends = "{spec_file}"\ndevice = "cuda"\n[defaults]\ncompiler = "aotinductor"\n'
    (tmp_path / "gpu.toml").write_text(text, encoding="utf-8")
    exported = export_engine(load_spec(tmp_path / "gpu.toml", **family), tmp_path / "engine")
    result = bench_engine(exported.path, batch=2, seconds=0.05, steps=3)
    assert [row.part for row in result.rows if row.side == "engine"] == PARTS
    assert result.notes[0].startswith("Pixel values of the two pipelines within one grey level: ")


def test_torch_compile_can_be_the_other_side(exported: Exported) -> None:
    with torch.compiler.set_stance("force_eager"):  # compiling eight parts would take minutes
        result = bench_engine(exported.path, batch=1, seconds=0.05, steps=2, against=("compile",))
    assert [(row.part, row.side) for row in result.rows] == [
        (part, side) for part in PARTS for side in ("engine", "compile")
    ]


def test_without_the_weights_the_engine_is_timed_alone_at_its_best_batch(
    exported: Exported, tmp_path: Path
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(exported.path, moved)
    manifest = json.loads((moved / "manifest.json").read_text(encoding="utf-8"))
    manifest["inputs"]["clip"]["path"] = "/gone/clip"
    (moved / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    result = bench_engine(moved, seconds=0.05, steps=2)
    assert {row.side for row in result.rows} == {"engine"}
    assert result.notes == ["Not compared with eager: the clip weights are no longer at /gone/clip."]
    networks = manifest["engine"]["networks"]
    best = {name: entry["signature"]["inputs"][0]["shape"][0]["best"] for name, entry in networks.items()}
    assert {row.part: row.batch for row in result.rows} == {
        **best,
        "denoise": best["unet"],
        "pipeline": best["unet"],
    }


def test_the_command_shows_and_writes_the_table(
    exported: Exported,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = [
        "--batch",
        "1",
        "--seconds",
        "0.05",
        "--steps",
        "2",
        "--against",
        "eager",
        "--out",
        str(tmp_path),
    ]
    monkeypatch.setattr(sys, "argv", ["ubgen-bench", "engine", "--engine", str(exported.path), *options])
    bench.main()
    assert "vae_decoder" in capsys.readouterr().out
    written = json.loads((tmp_path / "engine.json").read_text(encoding="utf-8"))
    assert {row["part"] for row in written["rows"]} == set(PARTS)
    assert written["machine"]["peak_memory"]["process"] > 0
    assert (tmp_path / "engine.md").read_text(encoding="utf-8").count("| denoise |") == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 0}, "--batch must be at least 1, not 0"),
        ({"seconds": 0.0}, "--seconds must be above 0"),
        ({"steps": 1}, "--steps must be at least 2"),
        ({"against": ("onnx",)}, "--against must be one of eager, compile, not onnx"),
    ],
)
def test_an_impossible_option_is_named(exported: Exported, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        bench_engine(exported.path, **options)


def test_a_directory_without_an_engine_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unfinished or not a ubgen export directory"):
        bench_engine(tmp_path)


def test_synthesis_is_timed_beside_its_peers(exported: Exported, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    result = bench_synth(
        exported.path, images=5, batch=2, steps=2, rounds=2, dataset=3_600_000, gpus=4, device="cpu"
    )
    assert torch.get_num_threads() == threads
    assert {name: len(rates) for name, rates in result.rates.items()} == {
        "ubgen-synth": 2,
        "bare loop": 2,
        "bare loop, scored": 2,
        "diffusers": 2,
    }
    assert set(result.busy) == {"denoise", "decode", "score", "select", "encode", "write"}
    assert sum(result.bottleneck.values()) == pytest.approx(1) or result.bottleneck == {}
    hours = 1000 / result.rate()
    assert result.projection() == pytest.approx({"hours": hours / 4, "gpu_hours": hours})
    result.write(tmp_path)
    written = json.loads((tmp_path / "synth.json").read_text(encoding="utf-8"))
    assert written["images_per_second"] == result.rates
    assert "3,600,000" in (tmp_path / "synth.md").read_text(encoding="utf-8")
    with pytest.raises(UserError, match="--rounds must be at least 1"):
        bench_synth(exported.path, rounds=0)
    with pytest.raises(UserError, match="--against must be one of bare, diffusers, not fast"):
        bench_synth(exported.path, against=("fast",))


def test_diffusers_is_timed_in_one_precision(exported: Exported, tmp_path: Path) -> None:
    """Each peer has the precision of its engine; diffusers' pipeline casts nothing between its networks."""
    mixed = tmp_path / "mixed"
    shutil.copytree(exported.path, mixed)
    manifest = json.loads((mixed / "manifest.json").read_text(encoding="utf-8"))
    manifest["engine"]["networks"]["vae_decoder"]["precision"] = "float16"
    (mixed / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    result = bench_synth(mixed, images=5, batch=5, steps=2, rounds=1, against=("diffusers",), device="cpu")
    assert len(result.rates["diffusers"]) == 1
