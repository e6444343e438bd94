"""The networks that are compiled: the values of diffusers' own modules, and a batch that is free in its range."""

from pathlib import Path

import onnxruntime as ort
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn

from ubgen.export.networks import UNet, Upsample, VaeDecoder

ROWS = 40  # diffusers' Upsample2D takes another branch from 64 rows on; guidance doubles these to 80


@pytest.fixture(scope="module")
def unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=2,
        norm_num_groups=4,
    ).eval()


def inputs(rows: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    return {
        "latents": torch.randn(rows, 4, 8, 8, generator=generator),
        "timestep": torch.full((rows,), 301.0),
        "cond": torch.randn(rows, 5, 8, generator=generator),
        "uncond": torch.randn(1, 5, 8, generator=generator),
        "guidance": torch.tensor([2.5]),
    }


@torch.no_grad()
def test_the_unet_is_diffusers_with_guidance_and_shares_its_weights(unet: UNet2DConditionModel) -> None:
    network, given = UNet(unet), inputs(3)
    x, t = given["latents"], given["timestep"]
    cond = unet(x, t, given["cond"]).sample
    uncond = unet(x, t, given["uncond"].expand(3, -1, -1)).sample
    torch.testing.assert_close(network(**given), uncond + 2.5 * (cond - uncond))
    assert {p.data_ptr() for p in network.parameters()} == {p.data_ptr() for p in unet.parameters()}
    assert not any(isinstance(part, Upsample) for part in unet.modules()), "the given network stays as it was"


@torch.no_grad()
def test_an_exported_unet_takes_many_rows(unet: UNet2DConditionModel) -> None:
    network = UNet(unet)
    assert any(isinstance(part, Upsample) for part in network.modules())
    rows = torch.export.Dim("batch", min=1, max=128)
    shapes = {name: {} if name in ("uncond", "guidance") else {0: rows} for name in inputs(2)}
    program = torch.export.export(network, (), inputs(2), dynamic_shapes=shapes).module()
    torch.testing.assert_close(program(**inputs(ROWS)), network(**inputs(ROWS)))


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(4, 4),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=2,
    ).eval()


@torch.no_grad()
def test_an_exported_decoder_takes_many_rows(vae: AutoencoderKL) -> None:
    network: nn.Module = VaeDecoder(vae)
    latents = torch.randn(80, 4, 4, 4)
    rows = torch.export.Dim("batch", min=1, max=128)
    program = torch.export.export(network, (latents[:2],), dynamic_shapes=({0: rows},)).module()
    wanted = vae.decode(latents / vae.config.scaling_factor).sample
    levels = ((wanted / 2 + 0.5).clamp(0, 1) * 255).round().permute(0, 2, 3, 1)
    assert ((program(latents).float() - levels).abs() <= 1).all()


def test_an_image_that_is_not_finite_comes_out_black_and_spoils_no_other(
    vae: AutoencoderKL, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    latents, network = torch.randn(4, 4, 4, 4), VaeDecoder(vae).eval()
    with torch.no_grad():
        whole = network(latents)
        torch.onnx.export(network, (latents,), tmp_path / "decoder.onnx", dynamo=True, verbose=False)
    latents[1, 2, 3, 0], latents[2, 0, 1, 1] = torch.nan, torch.inf
    session = ort.InferenceSession(tmp_path / "decoder.onnx", providers=["CPUExecutionProvider"])
    (compiled,) = session.run(None, {session.get_inputs()[0].name: latents.numpy()})
    for pixels in (network(latents), torch.from_numpy(compiled)):
        assert pixels[[1, 2]].max() == 0
        assert whole[[1, 2]].max() > 0
        assert ((pixels[[0, 3]].int() - whole[[0, 3]].int()).abs() <= 1).all()
