"""Engine directories: they run what was put in, and refuse to load anything else, saying what differs."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto, helper

from ubgen import runtime
from ubgen.core.errors import UserError
from ubgen.core.stage import Stage, content_hash
from ubgen.runtime import Dim, Signature, TensorSpec
from ubgen.runtime.backends import backend
from ubgen.runtime.engine import json_hash, key_parts

SPEC = {"device": "cpu"}


def write_doubling_graph(path: Path) -> None:
    """pixels (B,3) uint8 -> doubled (B,3) float32."""
    nodes = [
        helper.make_node("Cast", ["pixels"], ["real"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["real", "real"], ["doubled"]),
    ]
    source = helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["batch", 3])
    target = helper.make_tensor_value_info("doubled", TensorProto.FLOAT, ["batch", 3])
    model = helper.make_model(
        helper.make_graph(nodes, "double", [source], [target]),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )
    onnx.save(model, path)


def write_engine(out: Path) -> Path:
    rows = Dim("batch", 1, 4, 1000)
    signature = Signature(
        (TensorSpec("pixels", torch.uint8, (rows, 3)),), (TensorSpec("doubled", torch.float32, (rows, 3)),)
    )
    stage = Stage(out, "export", {}, {"spec": SPEC})
    with stage.hold():
        stage.begin()
        write_doubling_graph(out / "double.onnx")
        (out / "extra.txt").write_text("x", encoding="utf-8")
        parts = key_parts({"clip": "sha256:0"}, None, SPEC, {"onnxruntime"}, "cpu")
        network = {
            "compiler": "onnxruntime",
            "options": {},
            "file": "double.onnx",
            "files": {"double.onnx": content_hash(out / "double.onnx")},
            "signature": signature.to_dict(),
        }
        engine = {"key": json_hash(parts), "parts": parts, "networks": {"double": network}}
        stage.finish({}, engine={**engine, "extras": {"extra.txt": content_hash(out / "extra.txt")}})
    return out


def edit_manifest(engine: Path, change: Any, rekey: bool = True) -> None:
    manifest = json.loads((engine / "manifest.json").read_text(encoding="utf-8"))
    change(manifest)
    if rekey:
        manifest["engine"]["key"] = json_hash(manifest["engine"]["parts"])
    (engine / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    return write_engine(tmp_path / "engine")


def test_networks_run_by_name(engine: Path) -> None:
    engines = runtime.load(engine)
    assert list(engines) == ["double"]
    assert len(engines) == 1
    assert "unet" not in engines
    pixels = torch.randint(0, 256, (5, 3), dtype=torch.uint8)
    doubled = engines["double"].run({"pixels": pixels})["doubled"]
    assert doubled.dtype == torch.float32
    assert torch.equal(doubled, pixels.float() * 2)


def test_results_of_earlier_calls_stay(engine: Path) -> None:
    network = runtime.load(engine)["double"]
    first = network.run({"pixels": torch.full((2, 3), 1, dtype=torch.uint8)})["doubled"]
    network.run({"pixels": torch.full((2, 3), 9, dtype=torch.uint8)})
    assert torch.equal(first, torch.full((2, 3), 2.0))


def test_strided_input(engine: Path) -> None:
    pixels = torch.arange(12, dtype=torch.uint8).view(3, 4).T
    assert torch.equal(runtime.load(engine)["double"].run({"pixels": pixels})["doubled"], pixels.float() * 2)


def test_unfinished_directory(engine: Path) -> None:
    (engine / "manifest.json").unlink()
    with pytest.raises(UserError, match="unfinished"):
        runtime.load(engine)


def test_directory_of_another_stage(tmp_path: Path) -> None:
    stage = Stage(tmp_path / "train", "train", {})
    with stage.hold():
        stage.begin()
        stage.finish({})
    with pytest.raises(UserError, match="expected a ubgen export directory"):
        runtime.load(tmp_path / "train")


@pytest.mark.parametrize("file", ["double.onnx", "extra.txt"])
def test_a_changed_or_missing_file_is_named(engine: Path, file: str) -> None:
    (engine / file).write_bytes((engine / file).read_bytes()[:-1] + b"!")
    with pytest.raises(UserError, match=f"{file} is not the file that was exported"):
        runtime.load(engine)
    (engine / file).unlink()
    with pytest.raises(UserError, match=f"{file} is missing"):
        runtime.load(engine)


def test_a_file_that_is_no_graph(engine: Path) -> None:
    (engine / "double.onnx").write_bytes(b"not a graph")
    hashed = content_hash(engine / "double.onnx")
    edit_manifest(
        engine, lambda m: m["engine"]["networks"]["double"]["files"].update({"double.onnx": hashed})
    )
    with pytest.raises(UserError, match=r"double\.onnx cannot be opened by ONNX Runtime"):
        runtime.load(engine)["double"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda m: m["engine"]["parts"]["compilers"].update(onnxruntime="1.0"),
            r"compilers\.onnxruntime was '1\.0', now",
        ),
        (
            lambda m: m["engine"]["parts"].update(architecture="cuda-sm_90"),
            "architecture was 'cuda-sm_90', now 'cpu-",
        ),
        (lambda m: m["config"]["spec"].update(device="other"), "spec was sha256:"),
        (lambda m: m["engine"]["parts"].update(format=0), "format was 0, now"),
        (lambda m: m["engine"]["parts"].update(compilers={"gone": "1"}), "unknown compiler 'gone'"),
        (
            lambda m: m["engine"]["parts"].update(compilers={"tensorrt": "10.0.0"}),
            "compiler 'tensorrt' is not installed|compilers.tensorrt was '10.0.0'",
        ),
        (lambda m: m.pop("engine"), "does not describe an engine"),
    ],
)
def test_the_part_that_differs_is_named(engine: Path, change: Any, message: str) -> None:
    edit_manifest(engine, change, rekey="engine" not in message or "architecture" in message)
    with pytest.raises(UserError, match=message):
        runtime.load(engine)


def test_parts_that_do_not_give_the_key(engine: Path) -> None:
    edit_manifest(engine, lambda m: m["engine"]["parts"].update(lora="sha256:1"), rekey=False)
    with pytest.raises(UserError, match="does not match the parts"):
        runtime.load(engine)


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "CPU", "", "mps", "meta"])
def test_what_is_no_device_is_named(engine: Path, device: str) -> None:
    wanted = f"unknown device {device!r}; use cpu, cuda, or cuda:N"
    with pytest.raises(UserError, match=re.escape(wanted)):
        runtime.load(engine, device=device)
    with pytest.raises(UserError, match=re.escape(wanted)):
        backend("onnxruntime").probe(device)


def test_a_gpu_beyond_the_last_is_named(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(
        UserError, match="device 'cuda:2' does not exist; the last GPU of this machine is cuda:1"
    ):
        runtime.load(engine, device="cuda:2")


def test_another_device(engine: Path) -> None:
    with pytest.raises(UserError, match="cuda"):
        runtime.load(engine, device="cuda")


def test_onnx_runtime_writes_nothing_below_the_home_directory(tmp_path: Path) -> None:
    program = (
        "import ubgen, onnx, onnxruntime\n"
        "from onnx import TensorProto as T, helper as h\n"
        "ends = [h.make_tensor_value_info(name, T.FLOAT, [1]) for name in 'xy']\n"
        "graph = h.make_graph([h.make_node('Relu', ['x'], ['y'])], 'g', ends[:1], ends[1:])\n"
        "model = h.make_model(graph, opset_imports=[h.make_opsetid('', 20)], ir_version=10)\n"
        "onnxruntime.InferenceSession(model.SerializeToString(), providers=['CPUExecutionProvider'])\n"
    )
    environment = {**os.environ, "HOME": str(tmp_path), "XDG_CACHE_HOME": ""}
    environment.pop("ORT_DISABLE_TELEMETRY", None)
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)
    assert list(tmp_path.rglob("*onnxruntime*")) == []
