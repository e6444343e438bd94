"""Plans: right about sizes without reading a weight, and a refusal before any work where memory is short."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ubgen.core.config import resolve_path
from ubgen.core.errors import UserError
from ubgen.core.probes import Probe, at_least
from ubgen.diffusion import load_stable_diffusion
from ubgen.export import EngineSpec, export_engine, load_spec, plan_export
from ubgen.export.networks import UNet, VaeDecoder
from ubgen.export.plan import NetworkPlan, keeps_scores, memory_problem, plan_networks
from ubgen.export.spec import BatchRange, Options
from ubgen.rewards import QAlign

GIB = 2**30
SEVEN_BILLION = Path(__file__).parents[3] / "bench/qalign-7b.json"


def with_network(spec: EngineSpec, name: str, **changes: Any) -> EngineSpec:
    network = dataclasses.replace(getattr(spec.networks, name), **changes)
    return dataclasses.replace(spec, networks=dataclasses.replace(spec.networks, **{name: network}))


def planned(spec: EngineSpec, name: str) -> NetworkPlan:
    return next(plan for plan in plan_export(spec).networks if plan.name == name)


def test_sizes_and_shapes_are_those_of_the_real_networks() -> None:
    spec = load_spec("miniature")
    plan = plan_export(spec)
    assert [network.name for network in plan.networks] == [name for name, _ in spec.networks.items()]
    assert (plan.built, plan.complete, plan.problem) == ([], False, None)
    sd = load_stable_diffusion(spec.weights.stable_diffusion or "")
    unet, decoder = plan.networks[1], plan.networks[2]
    assert unet.parameters == sum(p.numel() for p in UNet(sd.unet).parameters())
    assert decoder.parameters == sum(p.numel() for p in VaeDecoder(sd.vae).parameters())
    assert unet.weight_bytes == unet.float32_bytes == 4 * unet.parameters
    assert [str(tensor) for tensor in unet.signature.inputs] == [
        "float32 (batch 1..128, 8, 8, 8)",
        "float32 (batch 1..128)",
        "float32 (batch 1..128, 16, 96)",
        "float32 (1, 16, 96)",
        "float32 (1)",
    ]
    assert str(decoder.signature.outputs[0]) == "uint8 (batch 1..128, 64, 64, 3)"
    assert [network.files for network in plan.networks[:2]] == [["text_encoder.onnx"], ["unet.onnx"]]
    assert unet.flops() > 2 * 2 * unet.parameters  # two rows, and every weight is used more than once


def test_low_precision_halves_weights_and_work() -> None:
    spec = load_spec("miniature")
    whole, half = planned(spec, "unet"), planned(with_network(spec, "unet", precision="float16"), "unet")
    kept = planned(with_network(spec, "unet", precision="float16", keep_float32=("unet.mid_block",)), "unet")
    assert 2 * half.weight_bytes == whole.weight_bytes
    assert half.float32_bytes == whole.float32_bytes
    assert half.activation_bytes < 0.7 * whole.activation_bytes
    assert half.weight_bytes < kept.weight_bytes < whole.weight_bytes


def write_empty_weights(directory: Path) -> None:
    """A safetensors file with the header of all of Q-Align's tensors, and a hole of 16 GB in place of their values."""
    with torch.device("meta"):
        tensors = QAlign(json.loads((directory / "config.json").read_text())).state_dict()
    header, end = {}, 0
    for name, tensor in tensors.items():
        start, end = end, end + 2 * tensor.numel()
        header[name] = {"dtype": "F16", "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def test_seven_billion_weights_without_reading_them(tmp_path: Path) -> None:
    shutil.copyfile(SEVEN_BILLION, tmp_path / "config.json")
    write_empty_weights(tmp_path)
    spec = with_network(load_spec("miniature", qalign=tmp_path), "qalign", precision="float16")
    plans = plan_export(spec).networks
    plan = plans[-1]
    # vision tower, abstractor, decoder without embedding and head, last norm, five rows of the head
    assert plan.parameters == 303_966_208 + 81_473_536 + 7_550_271_488 + 4096 + 5 * 4096
    assert 14.7 * GIB < plan.weight_bytes < 15 * GIB
    assert plan.files == ["qalign.onnx", "qalign.onnx.data"]
    assert 1.5e12 < plan.flops() < 1.97e12
    problem = memory_problem(spec, plans, host=24 * GIB, device=80 * GIB)
    assert re.match(r"exporting the networks of --qalign takes about \d\d\.\d GiB of memory", problem or "")
    problem = memory_problem(dataclasses.replace(spec, device="cuda"), plans, host=100 * GIB, device=16 * GIB)
    assert re.match(r"networks\.qalign at batch\.max = 128 takes .* cuda has 16\.0 GiB", problem or "")


@pytest.mark.parametrize(
    ("name", "graphs", "count"),
    [("miniature", False, sum), ("miniature-aoti", False, max), ("miniature-aoti", True, sum)],
)
def test_memory_that_engines_keep_is_added_up(
    name: str, graphs: bool, count: Callable[[list[int]], int]
) -> None:
    """AOTInductor's takes PyTorch's, which gets it back when a call ends, unless a CUDA graph holds it."""
    spec, options = load_spec(name), Options(cuda_graphs=graphs)
    plans = [
        dataclasses.replace(plan, spec=dataclasses.replace(plan.spec, options=options))
        for plan in plan_export(spec).networks
    ]
    needed = sum(p.weight_bytes for p in plans) + count([p.activation_bytes for p in plans])
    assert memory_problem(spec, plans, host=100 * GIB, device=needed) is None
    problem = memory_problem(spec, plans, host=100 * GIB, device=needed - 1)
    assert re.search(r"all networks .* beside .* of weights, .*: lower batch\.max", problem or "")


SD15_UNET = {
    "block_out_channels": [320, 640, 1280, 1280],
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
SD15_VAE = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
SD15_TEXT = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}


@pytest.fixture(scope="module")
def sd15_weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Configs of Stable Diffusion 1.5's size, and the miniature's scorers."""
    root = tmp_path_factory.mktemp("sd15")
    for name, config in (("unet", SD15_UNET), ("vae", SD15_VAE), ("text_encoder", SD15_TEXT)):
        (root / name).mkdir()
        (root / name / "config.json").write_text(json.dumps(config), encoding="utf-8")
    weights = load_spec("miniature").weights
    scorers = {"clip": weights.clip, "qalign": weights.qalign}
    return {"stable_diffusion": root, **{name: resolve_path(str(path)) for name, path in scorers.items()}}


# Channels at 64x64 in the UNet's last feed-forward part: the linear layer's result, one half of it through GELU, their
# product; around it what comes from below, three tensors that skipped ahead, and five of the block's own.
UNET = 2 * 64**2 * (2560 + 1280 + 1280 + 640 + 3 * 320 + 5 * 320)
DECODER = 512**2 * 3 * 256  # the last upsampled image, normalised, and through SiLU
SCORES = 2 * 8 * 64**4  # of the UNet's first attention
SD15 = ("sd15-fp16", "sd15-fp8", "sd15-torch-trt-fp16", "sd15-aoti-bf16", "sd15-ort-cuda-fp16", "sd15-cpu")


@pytest.mark.parametrize("name", SD15)
def test_the_memory_of_every_spec_against_a_count_by_hand(name: str, sd15_weights: dict[str, Path]) -> None:
    spec = load_spec(name)
    plans = {plan.name: plan for plan in plan_networks(spec, sd15_weights)}
    for network, values in (("unet", UNET), ("vae_decoder", DECODER)):
        plan, size = plans[network], 4 if spec.device == "cpu" else 2
        assert plan.activation_bytes == pytest.approx(size * values * plan.spec.batch.max, rel=0.01)


def test_scores_count_where_an_attention_is_several_operators(sd15_weights: dict[str, Path]) -> None:
    spec = with_network(load_spec("sd15-ort-cuda-fp16"), "unet", opset=20)
    unet = plan_networks(spec, sd15_weights)[1]
    assert pytest.approx(8.6e9, rel=0.01) == 2 * SCORES * 16  # one matrix at batch 16
    assert unet.activation_bytes == pytest.approx(2 * 2 * SCORES * unet.spec.batch.max, rel=0.08)


@pytest.mark.parametrize(
    ("spec", "dtype", "width", "masked", "kept"),
    [
        ("sd15-fp16", torch.float16, 40, False, False),
        ("sd15-fp16", torch.float16, 512, False, True),  # the decoder's: wider than any fused kernel
        ("sd15-fp16", torch.float32, 40, False, True),
        ("sd15-torch-trt-fp16", torch.bfloat16, 160, True, False),
        ("sd15-aoti-bf16", torch.float32, 512, True, False),
        ("sd15-ort-cuda-fp16", torch.float16, 512, False, False),
        ("sd15-ort-cuda-fp16", torch.float16, 64, True, True),
        ("sd15-ort-cuda-fp16", torch.bfloat16, 64, False, True),
        ("sd15-cpu", torch.float32, 40, False, False),
        ("sd15-cpu", torch.float16, 40, False, True),
    ],
)
def test_where_scores_are_kept(spec: str, dtype: torch.dtype, width: int, masked: bool, kept: bool) -> None:
    query = torch.empty(2, 8, 16, width, dtype=dtype, device="meta")
    assert keeps_scores(load_spec(spec).networks.unet, query, masked) is kept


def test_a_batch_beyond_the_memory_is_refused_before_any_work(tmp_path: Path) -> None:
    spec = with_network(load_spec("miniature"), "unet", batch=BatchRange(1, 16, 10**9))
    message = r"networks\.unet at batch\.max = 1000000000 takes .* GiB .*; cpu has .*: lower batch\.max"
    with pytest.raises(UserError, match=message):
        export_engine(spec, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert re.match(message, plan_export(spec).problem or "")


def test_an_image_size_that_the_networks_cannot_make(tmp_path: Path) -> None:
    spec = dataclasses.replace(load_spec("miniature"), image_size=72)
    with pytest.raises(
        UserError, match="image_size must be a multiple of 16 for these Stable Diffusion weights, not 72"
    ):
        export_engine(spec, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_module_to_keep_that_is_not_there(tmp_path: Path) -> None:
    spec = with_network(load_spec("miniature"), "unet", precision="float16", keep_float32=("unet.middle",))
    with pytest.raises(UserError, match=r"no module 'unet\.middle' with weights"):
        export_engine(spec, tmp_path / "out")
    assert not (tmp_path / "out").exists()


PROGRAM = """
import sys, torch
torch.cuda.is_available = lambda: True
torch.cuda.get_device_name = lambda *device: "stand-in"
torch.cuda.get_device_capability = lambda *device: (9, 0)
from ubgen.export import load_spec, machine_problem
for path in sys.argv[1:]:
    print(machine_problem(load_spec(path)))
"""


def test_a_tensorrt_without_what_the_opset_needs_is_named(tmp_path: Path) -> None:
    """On a machine that has a GPU, as far as torch is asked, and that release."""
    older = tmp_path / "older.toml"
    older.write_text('extends = "sd15-fp16"\n[defaults]\nopset = 20\n', encoding="utf-8")
    (tmp_path / "tensorrt.py").write_text('__version__ = "10.14.1.48"\n', encoding="utf-8")
    answer = subprocess.run(
        [sys.executable, "-c", PROGRAM, "sd15-fp16", str(older)],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert answer.stdout.splitlines() == [
        "tensorrt: 10.14.1.48 is too old; pip install --upgrade 'tensorrt>=10.15', or set opset = 20",
        "None",
    ]


def test_a_release_is_old_enough_by_numbers() -> None:
    assert at_least(Probe("tensorrt", True, "10.15.1.29"), "tensorrt", (10, 15)).available
    assert not at_least(Probe("tensorrt", True, "10.9.0.34"), "tensorrt", (10, 15)).available
    missing = Probe("tensorrt", False, "not installed")
    assert at_least(missing, "tensorrt", (10, 15)) == missing
