from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import save_file

from ubgen.core.errors import UserError
from ubgen.diffusion import (
    LORA_FILE,
    StableDiffusion,
    add_lora,
    load_lora,
    load_stable_diffusion,
    lora_parameters,
    merge_lora,
    save_lora,
)

INPUT = (torch.randn(2, 4, 8, 8), torch.tensor([10, 500]), torch.randn(2, 16, 32))


def trained(
    sd: StableDiffusion, rank: int, alpha: float | None = None, layers: str = "attention"
) -> StableDiffusion:
    """A LoRA whose B is not zero any more."""
    for parameter in add_lora(sd.unet, rank, alpha, seed=3, layers=layers):
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    return sd


def output(sd: StableDiffusion) -> torch.Tensor:
    with torch.no_grad():
        return sd.unet(*INPUT).sample


def test_lora_covers_the_attention_projections_and_starts_as_identity(tiny: StableDiffusion) -> None:
    before = output(tiny)
    parameters = add_lora(tiny.unet, rank=4, seed=5)
    assert len(parameters) == 64
    assert [p for p in tiny.unet.parameters() if p.requires_grad] != []
    assert sum(p.requires_grad for p in tiny.unet.parameters()) == 64
    assert torch.equal(before, output(tiny))
    down = torch.cat([p.flatten() for n, p in tiny.unet.named_parameters() if "lora_A" in n])
    assert down.std().item() == pytest.approx(1 / 4, rel=0.05)


def test_initial_lora_depends_on_the_seed_only(tiny: StableDiffusion, reference: Path) -> None:
    state = torch.random.get_rng_state()
    first = [p.clone() for p in add_lora(tiny.unet, rank=4, seed=5)]
    assert torch.equal(state, torch.random.get_rng_state())
    torch.manual_seed(1234)
    again = add_lora(load_stable_diffusion(reference / "model").unet, rank=4, seed=5)
    other = add_lora(load_stable_diffusion(reference / "model").unet, rank=4, seed=6)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_half_precision_base_gets_a_float32_lora(reference: Path) -> None:
    sd = load_stable_diffusion(reference / "model", dtype=torch.float16)
    assert {p.dtype for p in add_lora(sd.unet, rank=2)} == {torch.float32}


def test_lora_on_the_transformer_covers_its_linear_layers_and_no_other(tiny: StableDiffusion) -> None:
    before = output(tiny)
    add_lora(tiny.unet, rank=4, layers="transformer")
    assert torch.equal(before, output(tiny))
    blocks = [m for m in tiny.unet.modules() if type(m).__name__ == "Transformer2DModel"]
    inside = sum(p.requires_grad for block in blocks for p in block.parameters())
    per_block = 2 * 4 + 2 + 2  # layers: two attentions, feed-forward, into and out of the block
    assert inside == len(blocks) * per_block * 2  # A and B
    assert sum(p.requires_grad for p in tiny.unet.parameters()) == inside


@pytest.mark.parametrize(
    ("rank", "alpha", "layers"), [(4, None, "attention"), (8, 3, "attention"), (4, 2, "transformer")]
)
def test_saved_lora_loads_in_plain_diffusers(
    tiny: StableDiffusion, reference: Path, tmp_path: Path, rank: int, alpha: float | None, layers: str
) -> None:
    expected = output(trained(tiny, rank, alpha, layers))
    save_lora(tiny.unet, tmp_path)
    fresh = load_stable_diffusion(reference / "model")
    pipe = StableDiffusionPipeline(
        vae=fresh.vae,
        text_encoder=fresh.text_encoder,
        tokenizer=None,
        unet=fresh.unet,
        scheduler=fresh.scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.load_lora_weights(str(tmp_path))
    assert torch.equal(output(fresh), expected)


@pytest.mark.parametrize("layers", ["attention", "transformer"])
def test_alpha_other_than_rank_round_trips(
    tiny: StableDiffusion, reference: Path, tmp_path: Path, layers: str
) -> None:
    expected = output(trained(tiny, rank=8, alpha=2, layers=layers))
    save_lora(tiny.unet, tmp_path)
    loaded, merged = (load_stable_diffusion(reference / "model") for _ in range(2))
    load_lora(loaded.unet, tmp_path / LORA_FILE)
    merge_lora(merged.unet, tmp_path)
    assert torch.equal(output(loaded), expected)
    assert torch.allclose(output(merged), expected, atol=1e-5)
    assert not lora_parameters(merged.unet)


def test_same_lora_gives_the_same_bytes(tiny: StableDiffusion, tmp_path: Path) -> None:
    trained(tiny, rank=4)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first, second = save_lora(tiny.unet, tmp_path / "a"), save_lora(tiny.unet, tmp_path / "b")
    assert first.read_bytes() == second.read_bytes()
    with safe_open(first, "pt") as file:
        assert all(name.startswith("unet.") and ".lora." in name for name in file.keys())  # noqa: SIM118


def test_merging_into_half_precision_happens_in_float32(reference: Path) -> None:
    """Rounding the sum once equals casting the float32 merge."""
    half = load_stable_diffusion(reference / "model", dtype=torch.bfloat16).unet
    full = load_stable_diffusion(reference / "model", dtype=torch.bfloat16).unet.float()
    for unet in (half, full):
        merge_lora(unet, reference / "model" / "lora")
    assert half.dtype == torch.bfloat16
    expected = full.to(torch.bfloat16).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in half.state_dict().items())


def test_wrong_lora_files_are_refused(tiny: StableDiffusion, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such LoRA file"):
        load_lora(tiny.unet, tmp_path / "nothing")
    (tmp_path / "cut.safetensors").write_bytes(b"\x99" * 40)
    with pytest.raises(UserError, match=r"cut\.safetensors: not a readable"):
        load_lora(tiny.unet, tmp_path / "cut.safetensors")
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="holds no LoRA"):
        load_lora(tiny.unet, tmp_path / "other.safetensors")
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora"
    shapes = {f"{name}.down.weight": torch.zeros(4, 999), f"{name}.up.weight": torch.zeros(999, 4)}
    save_file(shapes, tmp_path / "shape.safetensors")
    with pytest.raises(UserError, match="not a LoRA for this UNet"):
        load_lora(tiny.unet, tmp_path / "shape.safetensors")
