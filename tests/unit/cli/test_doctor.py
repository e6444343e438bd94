"""ubgen-doctor, on this machine and on one where much is wrong."""

import json
import os
import subprocess
import sys

import pytest
import torch

from ubgen.cli import doctor
from ubgen.core.probes import all_probes
from ubgen.ops import native_status


@pytest.fixture(scope="module")
def poor_machine(tmp_path_factory):
    """No GPU, no tools, and packages that are there but of no use: probe name -> probe."""
    directory = tmp_path_factory.mktemp("packages")
    (directory / "torch_tensorrt.py").write_text("raise Exception('libnvinfer.so.11 was not found')\n")
    (directory / "tensorrt.py").write_text("__version__ = '10.9.0.34'\n")
    (directory / "xformers").mkdir()
    (directory / "xformers" / "__init__.py").write_text("__version__ = '0.0.35'\n")
    (directory / "xformers" / "ops.py").write_text("")
    settings = {"PYTHONPATH": str(directory), "PATH": str(directory), "CXX": "g++-of-nobody"}
    environment = {**os.environ, **settings, "CUDA_VISIBLE_DEVICES": "", "UBGEN_DISABLE_NATIVE": "1"}
    command = [sys.executable, "-m", "ubgen.cli.doctor", "--json"]
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return {probe["name"]: probe for probe in json.loads(answer.stdout)}


def test_every_part_of_this_machine_has_a_verdict_and_a_reason():
    probes = {probe.name: probe for probe in all_probes()}
    assert probes["torch: CPU"].available
    assert probes["onnxruntime: CPU"].available
    assert probes["torch: CUDA"].available == torch.cuda.is_available()
    assert probes["native library: CPU"].available == native_status()[0]
    assert probes["aotinductor: CPU"].available == probes["C++ compiler"].available
    assert {"onnxruntime: CUDA", "aotinductor: CUDA", "modelopt (float8)"} <= set(probes)
    assert {"tensorrt", "torch_tensorrt", "xformers", "nvidia.dali", "ray", "nvcc"} <= set(probes)
    assert all(probe.detail for probe in probes.values())


def test_the_table_shows_every_probe(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["ubgen-doctor"])
    monkeypatch.setenv("COLUMNS", "1000")
    doctor.main()
    lines = capsys.readouterr().out.splitlines()
    for probe in all_probes():
        (row,) = [line for line in lines if f" {probe.name} " in line]
        assert row.split("│")[2].strip() == ("yes" if probe.available else "no")
        assert probe.detail in row


def test_a_reason_says_that_the_reference_runs(poor_machine):
    probe = poor_machine["native library: CPU"]
    assert not probe["available"]
    assert probe["detail"] == "switched off by UBGEN_DISABLE_NATIVE; PyTorch runs instead"


def test_a_package_whose_import_fails_oddly_is_a_reason_and_not_a_crash(poor_machine):
    probe = poor_machine["torch_tensorrt"]
    assert not probe["available"]
    assert "installed, but its import fails: Exception: libnvinfer.so.11 was not found" in probe["detail"]


def test_a_tensorrt_that_is_too_old_is_refused(poor_machine):
    assert not poor_machine["tensorrt"]["available"]
    assert (
        "10.9.0.34 is too old; pip install --upgrade 'tensorrt>=10.12'" in poor_machine["tensorrt"]["detail"]
    )


def test_onnx_runtimes_gpu_package_takes_the_place_of_the_other():
    probe = next(probe for probe in all_probes() if probe.name == "onnxruntime: CUDA")
    if "has no CUDAExecutionProvider" not in probe.detail:
        pytest.skip("this ONNX Runtime has it")
    hint = "; pip uninstall onnxruntime, then pip install -c constraints.txt onnxruntime-gpu"
    assert probe.detail.endswith(hint)


def test_engines_cannot_be_built_without_a_compiler(poor_machine):
    assert not poor_machine["aotinductor: CPU"]["available"]
    assert "engines cannot be built: g++-of-nobody" in poor_machine["aotinductor: CPU"]["detail"]


def test_missing_tools_are_named(poor_machine):
    assert not poor_machine["C++ compiler"]["available"]
    assert "g++-of-nobody is not on the PATH" in poor_machine["C++ compiler"]["detail"]


def test_xformers_on_a_cpu_is_refused_although_it_imports(poor_machine):
    assert not poor_machine["xformers"]["available"]
    assert "no operator for CPU tensors" in poor_machine["xformers"]["detail"]
