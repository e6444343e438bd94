"""A network that low precision breaks is compiled again in mixed precision, in a real export, or the export fails."""

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ubgen import runtime
from ubgen.core.errors import UserError
from ubgen.core.stage import read_manifest
from ubgen.export import Exported, ParityRow, export_engine, load_spec

LAYERS = ("decoder.mid_block.resnets.0.conv1", "decoder.mid_block.resnets.0.norm2")


@pytest.fixture(scope="module")
def loud_family(family: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The decoder's middle has weights and values beyond float16's 65504; the norm behind takes the size away again."""
    path = tmp_path_factory.mktemp("loud") / "stable-diffusion"
    shutil.copytree(family["stable_diffusion"], path)
    file = path / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    for part in ("weight", "bias"):
        tensors[f"{LAYERS[0]}.{part}"] *= 1e7
    save_file(tensors, file)
    return {**family, "stable_diffusion": str(path)}


@pytest.fixture(scope="module")
def killed(
    exported: Exported,
    loud_family: dict[str, str],
    half_spec: Path,
    lora: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """An engine directory whose decoder was being replaced by another when the process was killed."""
    out = tmp_path_factory.mktemp("killed") / "engine"
    shutil.copytree(exported.path, out)
    options = {"spec": half_spec, "out": out, "lora": lora, **loud_family}
    command = [sys.executable, "-c", "from ubgen.cli.export import main; main()", "--overwrite"]
    for name, value in options.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (out / ".building").exists():
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return out


def test_a_killed_export_leaves_no_half_engine(killed: Path) -> None:
    assert (killed / ".building").exists(), "it was killed too late"
    with pytest.raises(UserError, match="unfinished"):
        runtime.load(killed)


@dataclasses.dataclass
class Continued:
    result: Exported
    said: list[str]
    times_before: dict[str, int]


@pytest.fixture(scope="module")
def continued(killed: Path, loud_family: dict[str, str], half_spec: Path, lora: Path) -> Continued:
    """The killed export, continued."""
    said: list[str] = []
    before = times(killed)
    return Continued(
        export_engine(load_spec(half_spec, **loud_family), killed, lora, say=said.append), said, before
    )


def times(engine: Path) -> dict[str, int]:
    return {file.name: file.stat().st_mtime_ns for file in engine.glob("*.onnx")}


def decoder_row(result: Exported) -> ParityRow:
    return next(row for row in result.parity if row.network == "vae_decoder")


def test_layers_that_overflow_in_float16_are_left_in_float32(continued: Continued) -> None:
    result, killed = continued.result, continued.result.path
    row = decoder_row(result)
    assert row.error_without is not None
    assert row.error_without > 0.5, "float16 alone must break it, or this test shows nothing"
    assert row.error <= 0.02
    assert row.kept_float32 == LAYERS
    assert result.pipeline.passed
    assert result.pipeline.lowered is not None
    assert (
        40 < result.pipeline.lowered["lowest_psnr"] < 100
    )  # PyTorch's own decoder, with the same layers in float32
    assert "PyTorch itself in these precisions: PSNR" in (killed / "parity.md").read_text(encoding="utf-8")
    assert read_manifest(killed)["parity"][2]["kept_float32"] == list(LAYERS)
    assert LAYERS[0] in (killed / "parity.md").read_text(encoding="utf-8")
    assert float16_share(killed / "vae_decoder.onnx") > 0.7
    assert list(runtime.load(killed)) == [row.network for row in result.parity]
    # what had not changed was not compiled again, and nothing else is left
    assert [line for line in continued.said if "compiling" in line] == [
        "vae_decoder: compiling with onnxruntime in float16"
    ] * 2
    before, now = continued.times_before, times(killed)
    assert {name for name in before if before[name] != now[name]} == {"vae_decoder.onnx"}
    assert not (killed / ".building").exists()


@pytest.mark.parametrize(("tolerance", "kept"), [(0.03, LAYERS), (1.0, ())])
def test_layers_stay_in_float32_while_the_tolerance_needs_them(
    tolerance: float,
    kept: tuple[str, ...],
    continued: Continued,
    half_spec: Path,
    loud_family: dict[str, str],
    lora: Path,
    tmp_path: Path,
) -> None:
    """Without them all images are wrong, which only the loosest limits let pass."""
    images = "[parity.chain]\npsnr = 0.1\nwithin_one_level = 1e-9\nclip_similarity = 2.0\nquality = 5.0\n"
    decoder = f"[networks.vae_decoder]\ntolerance = {tolerance}\n"
    loose = tmp_path / "loose.toml"
    loose.write_text(f'extends = "{half_spec}"\n{decoder}{images}', encoding="utf-8")
    engine = tmp_path / "engine"
    shutil.copytree(continued.result.path, engine)
    result = export_engine(load_spec(loose, **loud_family), engine, lora, overwrite=True)
    assert decoder_row(result).kept_float32 == kept


def float16_share(path: Path) -> float:
    """Of the weights."""
    import onnx

    sizes = {onnx.TensorProto.FLOAT: 0, onnx.TensorProto.FLOAT16: 0}
    for tensor in onnx.load(path).graph.initializer:
        if tensor.data_type in sizes:
            sizes[tensor.data_type] += int(torch.tensor(tensor.dims).prod())
    return sizes[onnx.TensorProto.FLOAT16] / sum(sizes.values())


def test_images_that_miss_fail(
    exported: Exported, family: dict[str, str], spec_file: Path, lora: Path, tmp_path: Path
) -> None:
    """And the report that says why is there."""
    assert exported.pipeline.lowered is None  # all in float32
    out = tmp_path / "engine"
    shutil.copytree(exported.path, out)
    spec = load_spec(spec_file, **family)
    chain = dataclasses.replace(spec.parity.chain, psnr=101.0)  # more than equal images reach
    spec = dataclasses.replace(spec, parity=dataclasses.replace(spec.parity, chain=chain))
    with pytest.raises(UserError, match=r"the engines' images differ from PyTorch's: PSNR .* is below 101"):
        export_engine(spec, out, lora, overwrite=True)
    with pytest.raises(UserError, match="unfinished"):
        runtime.load(out)
    assert json.loads((out / "parity.json").read_text(encoding="utf-8"))["chain"]["misses"]
