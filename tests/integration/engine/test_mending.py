"""A network that low precision breaks is mended in a real export, or the export fails."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ubgen import runtime
from ubgen.errors import UserError
from ubgen.export import EngineSpec, Exported, export_engine, load_spec
from ubgen.manifest import read_manifest

LAYERS = ("decoder.mid_block.resnets.0.conv1", "decoder.mid_block.resnets.0.norm2")


@pytest.fixture
def loud_family(family: dict[str, str], tmp_path: Path) -> dict[str, str]:
    """The decoder's middle has weights and values beyond float16's 65504; the norm behind takes the size away again."""
    path = tmp_path / "stable-diffusion"
    shutil.copytree(family["stable_diffusion"], path)
    file = path / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    for part in ("weight", "bias"):
        tensors[f"{LAYERS[0]}.{part}"] *= 1e7
    save_file(tensors, file)
    return {**family, "stable_diffusion": str(path)}


@pytest.fixture
def started(exported: Exported, tmp_path: Path) -> Path:
    """An unfinished directory with all networks of the other export: only the decoder differs."""
    out = tmp_path / "engine"
    shutil.copytree(exported.path, out)
    (out / "manifest.json").unlink()
    return out


def with_decoder(spec: EngineSpec, **changes: object) -> EngineSpec:
    decoder = dataclasses.replace(spec.networks.vae_decoder, **changes)  # type: ignore[arg-type]
    return dataclasses.replace(spec, networks=dataclasses.replace(spec.networks, vae_decoder=decoder))


def half(spec_file: Path, family: dict[str, str]) -> EngineSpec:
    spec = with_decoder(load_spec(spec_file, **family), precision="float16", tolerance=0.02)
    chain = dataclasses.replace(spec.parity.chain, psnr=40.0, within_one_level=0.95)
    return dataclasses.replace(spec, parity=dataclasses.replace(spec.parity, chain=chain))


def test_layers_that_overflow_in_float16_are_left_in_float32(
    loud_family: dict[str, str], spec_file: Path, lora: Path, started: Path
) -> None:
    said: list[str] = []
    unet = (started / "unet.onnx").stat().st_mtime_ns
    result = export_engine(half(spec_file, loud_family), started, lora, say=said.append)
    row = next(row for row in result.parity if row.network == "vae_decoder")
    assert row.error_without is not None
    assert row.error_without > 0.5, "float16 alone must break it, or this test shows nothing"
    assert row.error <= 0.02
    assert row.kept_float32 == LAYERS
    assert result.chain.passed
    manifest = read_manifest(started)
    assert manifest["parity"][2]["kept_float32"] == list(LAYERS)
    assert LAYERS[0] in (started / "parity.md").read_text(encoding="utf-8")
    assert float16_share(started / "vae_decoder.onnx") > 0.7
    # and what had not changed was not compiled again
    assert not [line for line in said if "compiling" in line and "vae_decoder" not in line]
    assert (started / "unet.onnx").stat().st_mtime_ns == unet


def float16_share(path: Path) -> float:
    """Of the weights."""
    import onnx

    sizes = {onnx.TensorProto.FLOAT: 0, onnx.TensorProto.FLOAT16: 0}
    for tensor in onnx.load(path).graph.initializer:
        if tensor.data_type in sizes:
            sizes[tensor.data_type] += int(torch.tensor(tensor.dims).prod())
    return sizes[onnx.TensorProto.FLOAT16] / sum(sizes.values())


def test_what_float32_does_not_mend_fails(
    family: dict[str, str], spec_file: Path, lora: Path, started: Path
) -> None:
    """An engine is asked to be nearer to PyTorch than pixels can be: no layer is to blame."""
    spec = with_decoder(half(spec_file, family), tolerance=1e-9)
    with pytest.raises(UserError, match=r"vae_decoder: .* stays unfinished"):
        export_engine(spec, started, lora)
    assert not (started / ".building").exists()
    with pytest.raises(UserError, match="unfinished"):
        runtime.load(started)


def test_a_chain_that_misses_fails(
    family: dict[str, str], spec_file: Path, lora: Path, started: Path
) -> None:
    spec = load_spec(spec_file, **family)
    chain = dataclasses.replace(spec.parity.chain, quality=1e-30, psnr=EXACT)
    spec = dataclasses.replace(spec, parity=dataclasses.replace(spec.parity, chain=chain))
    with pytest.raises(UserError, match=r"the engines' images differ from PyTorch's: PSNR .* is below 101"):
        export_engine(spec, started, lora)
    assert not (started / "manifest.json").exists()
    report = json.loads((started / "parity.json").read_text(encoding="utf-8"))
    assert report["chain"]["misses"]


EXACT = 101.0  # dB: more than equal images reach
