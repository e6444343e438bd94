"""The script of the first minutes on a GPU: its parts on a CPU, reduced, and what becomes of a part that is late."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ubgen.export.compilers import onnx
from ubgen.export.exportable import Exportable
from ubgen.export.spec import BatchRange, NetworkSpec

SCRIPT = Path(__file__).resolve().parents[3] / "bench/gpu_first.py"


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("gpu_first", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    sys.modules["gpu_first"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["gpu_first"]


def results(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text(encoding="utf-8").splitlines()]


def test_the_parts_write_what_they_find(script: Any, tmp_path: Path) -> None:
    place = script.Place(tmp_path, "cpu", small=True)
    for name in ("machine", "kernels", "tensorrt", "unet-eager", "qalign", "synthesis"):
        script.PARTS[name][1](place)
    lines = results(tmp_path)
    found = {
        name: [line for line in lines if line["part"] == name] for name in {line["part"] for line in lines}
    }
    assert found["ceiling"][0]["tflops"] > 0
    assert found["kernels"][0]["same_bits"]
    assert [line["split"] for line in found["tensorrt"] if "split" in line] == [True, False]
    assert all(line["attentions"] == 1 for line in found["tensorrt"] if "split" in line)
    timed, compared = found["unet"][1:]
    assert timed["tflops"] == pytest.approx(timed["share_of_ceiling"] * found["ceiling"][0]["tflops"])
    assert compared["error"] < 1e-5
    assert [line["variant"] for line in found["qalign"]] == ["whole", "folded"]
    assert found["decoder"][0]["ms"] > 0
    assert found["synthesis"][0]["skipped"] == "no GPU"


@pytest.mark.slow
def test_an_update_of_the_generator_is_logged(script: Any, tmp_path: Path) -> None:
    script.training(script.Place(tmp_path, "cpu", small=True))
    (row,) = results(tmp_path)
    assert (row["precision"], row["phase"], row["step"]) == ("bf16", "train", 2), row


def test_a_late_part_is_cut_with_what_it_started_and_the_rest_goes_on(script: Any, tmp_path: Path) -> None:
    child = f"import subprocess; subprocess.run(['sh', '-c', 'sleep 1.5; touch {tmp_path}/alive'])"
    commands = {
        "late": (0.5, [sys.executable, "-c", child]),
        "broken": (5, [sys.executable, "-c", "raise SystemExit('no such thing')"]),
        "fine": (5, [sys.executable, "-c", "pass"]),
        "slow": (9, [sys.executable, "-c", "import time; time.sleep(9)"]),
        "after": (9, [sys.executable, "-c", "pass"]),
    }
    script.run_parts(script.Place(tmp_path), commands, total=2.5)
    lines = {line["part"]: line for line in results(tmp_path)}
    assert lines["late"]["late"] == 0.5
    assert (lines["broken"]["failed"], lines["broken"]["last"]) == (1, ["no such thing"])
    assert lines["fine"]["ended"]
    assert lines["slow"]["late"] < 2.5
    assert lines["after"]["skipped"] == "no time left"
    assert not (tmp_path / "alive").exists()


def test_a_graph_is_carried_without_weights(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx, "EMBED_LIMIT", 0)
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 96), nn.SiLU(), nn.Linear(96, 64)).half().eval()
    network = Exportable(module, [{"input": torch.randn(2, 5, 64).half()}], "out")
    graph = tmp_path / "net.onnx"
    onnx.export_onnx(network, NetworkSpec(BatchRange(1, 2, 4), 1e-2, "tensorrt", "float16", 23), graph)
    data = graph.with_name("net.onnx.data")
    whole = data.read_bytes()
    assert script.strip(graph, graph, module) == len(whole)
    assert graph.with_suffix(".json").stat().st_size < len(whole) / 10
    data.unlink()
    script.fill(graph, module)
    assert data.read_bytes() == whole
