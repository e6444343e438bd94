"""Plans: right about sizes without reading a weight, and a refusal before any work where memory is short."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ubgen.core.errors import UserError
from ubgen.diffusion import load_stable_diffusion
from ubgen.export import EngineSpec, export_engine, load_spec, plan_export
from ubgen.export.activations import peak_activations
from ubgen.export.networks import UNet, VaeDecoder
from ubgen.export.plan import NetworkPlan, check_memory
from ubgen.export.spec import BatchRange, Options

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
    assert (plan.built, plan.complete, plan.problems) == ([], False, [])
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


def test_seven_billion_weights_from_their_config_alone(tmp_path: Path) -> None:
    shutil.copyfile(SEVEN_BILLION, tmp_path / "config.json")
    spec = with_network(load_spec("miniature", qalign=tmp_path), "qalign", precision="float16")
    plans = plan_export(spec).networks
    plan = plans[-1]
    # vision tower, abstractor, decoder without embedding and head, last norm, five rows of the head
    assert plan.parameters == 303_966_208 + 81_473_536 + 7_550_271_488 + 4096 + 5 * 4096
    assert 14.7 * GIB < plan.weight_bytes < 15 * GIB
    assert plan.files == ["qalign.onnx", "qalign.onnx.data"]
    assert 1.5e12 < plan.flops() < 1.97e12
    with pytest.raises(
        UserError, match=r"exporting the networks of --qalign takes about \d\d\.\d GiB of memory"
    ):
        check_memory(spec, plans, host=24 * GIB, device=80 * GIB)
    with pytest.raises(UserError, match=r"networks\.qalign at batch\.max = 128 takes .* cuda has 16\.0 GiB"):
        check_memory(dataclasses.replace(spec, device="cuda"), plans, host=100 * GIB, device=16 * GIB)


@pytest.mark.parametrize(
    ("name", "graphs", "count"),
    [("miniature", False, sum), ("miniature-aoti", False, max), ("miniature-aoti", True, sum)],
)
def test_memory_that_engines_keep_is_added_up(
    name: str, graphs: bool, count: Callable[[list[int]], int]
) -> None:
    """AOTInductor's takes PyTorch's, which gets it back when a call ends, unless a CUDA graph holds it."""
    spec = load_spec(name)
    for network in plan_export(spec).networks:
        spec = with_network(spec, network.name, options=Options(cuda_graphs=graphs))
    plans = plan_export(spec).networks
    needed = sum(p.weight_bytes for p in plans) + count([p.activation_bytes for p in plans])
    check_memory(spec, plans, host=100 * GIB, device=needed)
    with pytest.raises(UserError, match=r"all networks .* beside .* of weights, .*: lower batch\.max"):
        check_memory(spec, plans, host=100 * GIB, device=needed - 1)


class Chain(nn.Module):
    """Each result is dropped when the next is there; attention's matrix of scores is never whole."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(4, 1024)

    def forward(self, x: Tensor) -> Tensor:
        x = self.wide(x)
        x = x + 1
        x = x * 2
        q = x[:, None]
        return nn.functional.scaled_dot_product_attention(q, q, q)[:, 0, :, :4].clone()


def test_peak_activations() -> None:
    chain = Chain().to("meta")
    peak, output = peak_activations(chain, {"x": torch.empty(8, 2048, 4, device="meta")})
    wide, narrow = 8 * 2048 * 1024 * 4, 8 * 2048 * 4 * 4
    assert output.shape == (8, 2048, 4)
    # attention's input and output, and the first input and the last output that are still there
    assert peak == 2 * wide + 2 * narrow


def test_a_batch_beyond_the_memory_is_refused_before_any_work(tmp_path: Path) -> None:
    spec = with_network(load_spec("miniature"), "unet", batch=BatchRange(1, 16, 10**9))
    message = r"networks\.unet at batch\.max = 1000000000 takes .* GiB .*; cpu has .*: lower batch\.max"
    with pytest.raises(UserError, match=message):
        export_engine(spec, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert len(plan_export(spec).problems) == 1


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
