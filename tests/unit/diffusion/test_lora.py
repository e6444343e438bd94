import re
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
    without_lora,
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


def test_without_its_lora_it_is_the_base_and_gradients_of_before_stay(tiny: StableDiffusion) -> None:
    base = output(tiny)
    parameters = lora_parameters(trained(tiny, 4).unet)
    tuned = tiny.unet(*INPUT).sample
    expected = torch.autograd.grad(tuned.square().mean(), parameters, retain_graph=True)
    with without_lora(tiny.unet):
        assert torch.equal(output(tiny), base)
    assert torch.equal(output(tiny), tuned)
    assert all(p.requires_grad for p in parameters)
    tuned.square().mean().backward(inputs=parameters)
    assert all(
        torch.equal(p.grad, g) for p, g in zip(parameters, expected, strict=True) if p.grad is not None
    )
    assert all(p.grad is not None for p in parameters)


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


LAYER = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "down_blocks.0.resnets.0.conv1"
GOOD = {"lora.down.weight": torch.ones(4, 64) / 9, "lora.up.weight": torch.ones(64, 4) / 7}


def added(unet: torch.nn.Module, path: Path, layer: str = LAYER) -> torch.Tensor:
    """What merging the file adds to the layer's weight; nothing else may change."""
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    merge_lora(unet, path)
    after = unet.state_dict()
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert changed == {f"{layer}.weight"}
    return after[f"{layer}.weight"] - before[f"{layer}.weight"]


KOHYA = f"lora_unet_{LAYER.replace('.', '_')}"


@pytest.mark.parametrize(
    ("down", "up"),
    [
        (f"unet.{LAYER}.lora.down.weight", f"unet.{LAYER}.lora.up.weight"),
        (f"{LAYER}.lora.down.weight", f"{LAYER}.lora.up.weight"),
        (f"unet.{LAYER}.lora_A.weight", f"unet.{LAYER}.lora_B.weight"),
        (f"{KOHYA}.lora_down.weight", f"{KOHYA}.lora_up.weight"),
        (
            f"unet.{LAYER[:-5]}.processor.to_q_lora.down.weight",
            f"unet.{LAYER[:-5]}.processor.to_q_lora.up.weight",
        ),
    ],
    ids=["diffusers", "without prefix", "peft in diffusers", "kohya", "attention processors"],
)
@pytest.mark.parametrize("alpha", [None, 1.0])
def test_every_naming_is_read_and_alpha_is_honoured(
    tiny: StableDiffusion, tmp_path: Path, down: str, up: str, alpha: float | None
) -> None:
    file = tmp_path / LORA_FILE
    tensors = {down: GOOD["lora.down.weight"], up: GOOD["lora.up.weight"]}
    name = re.sub(r"(_lora|\.lora)[._](down|A)\.weight$", "", down)
    if alpha is not None:
        tensors[f"{name}.alpha" if "processor" not in down else f"unet.{LAYER}.alpha"] = torch.tensor(alpha)
    save_file(tensors, file)
    expected = GOOD["lora.up.weight"] @ GOOD["lora.down.weight"] * (1.0 if alpha is None else alpha / 4)
    torch.testing.assert_close(added(tiny.unet, file), expected, atol=1e-6, rtol=1e-5)


def test_ranks_and_alphas_may_differ_from_layer_to_layer(tiny: StableDiffusion, tmp_path: Path) -> None:
    other = LAYER.replace("to_q", "to_k")
    save_file(
        {
            f"unet.{LAYER}.lora.down.weight": torch.ones(2, 64),
            f"unet.{LAYER}.lora.up.weight": torch.ones(64, 2),
            f"unet.{LAYER}.alpha": torch.tensor(1.0),
            f"unet.{other}.lora.down.weight": torch.ones(8, 64),
            f"unet.{other}.lora.up.weight": torch.ones(64, 8),
            f"unet.{other}.alpha": torch.tensor(16.0),
        },
        tmp_path / LORA_FILE,
    )
    before = {name: tiny.unet.get_submodule(name).weight.clone() for name in (LAYER, other)}
    merge_lora(tiny.unet, tmp_path)
    for name, value in ((LAYER, 2 * 1 / 2), (other, 8 * 16 / 8)):
        change = tiny.unet.get_submodule(name).weight - before[name]
        torch.testing.assert_close(change, torch.full_like(change, value))


def test_a_convolution(tiny: StableDiffusion, tmp_path: Path) -> None:
    """Also of 3x3: up is of 1x1, so that the product is a sum over the rank."""
    weight = tiny.unet.get_submodule(CONV).weight
    generator = torch.Generator().manual_seed(0)
    down = torch.randn(2, *weight.shape[1:], generator=generator)
    up = torch.randn(weight.shape[0], 2, 1, 1, generator=generator)
    save_file(
        {f"unet.{CONV}.lora.down.weight": down, f"unet.{CONV}.lora.up.weight": up}, tmp_path / LORA_FILE
    )
    expected = torch.einsum("or,rihw->oihw", up[..., 0, 0], down)
    torch.testing.assert_close(added(tiny.unet, tmp_path, CONV), expected, atol=1e-5, rtol=1e-4)


def test_what_peft_itself_saves_has_its_alpha_beside_it(
    tiny: StableDiffusion, reference: Path, tmp_path: Path
) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        tiny.unet, LoraConfig(r=4, lora_alpha=1, target_modules=["to_q"], init_lora_weights=False)
    )
    model.save_pretrained(tmp_path)
    expected = model.merge_and_unload(safe_merge=True).state_dict()
    merged = load_stable_diffusion(reference / "model").unet
    merge_lora(merged, tmp_path / "adapter_model.safetensors")
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-6, rtol=1e-5)
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(UserError, match=r"adapter_config\.json: no such file"):
        load_lora(merged, tmp_path / "adapter_model.safetensors")


PAIR = {f"unet.{LAYER}.{name}": tensor for name, tensor in GOOD.items()}
NAN = {f"unet.{LAYER}.lora.up.weight": torch.full((64, 4), float("nan"))}


@pytest.mark.parametrize(
    ("tensors", "named", "message"),
    [
        (
            PAIR | {"text_encoder.x.lora.up.weight": torch.ones(1)},
            "text_encoder.x.lora.up.weight",
            "belongs to a text encoder",
        ),
        (
            PAIR | {"lora_te_x.lora_up.weight": torch.ones(1)},
            "lora_te_x.lora_up.weight",
            "belongs to a text encoder",
        ),
        (PAIR | {f"unet.{LAYER}.dora_scale": torch.ones(1)}, f"unet.{LAYER}.dora_scale", "part of a DoRA"),
        (PAIR | {f"{KOHYA}.diff_b": torch.ones(64)}, f"{KOHYA}.diff_b", "part of a full difference"),
        (PAIR | {f"{KOHYA}.hada_w1_a": torch.ones(64)}, f"{KOHYA}.hada_w1_a", "part of a LoHa"),
        (
            PAIR | {"unet.nowhere.lora.up.weight": torch.ones(1)},
            "unet.nowhere.lora.up.weight",
            "fits no layer",
        ),
        (PAIR | {"lora_unet_no_where.alpha": torch.ones(())}, "lora_unet_no_where.alpha", "fits no layer"),
        (PAIR | {"weight": torch.ones(1)}, "weight", "is not of a LoRA in the naming of"),
        (
            PAIR | {f"{KOHYA}.lora_up.weight": torch.ones(64, 4)},
            f"unet.{LAYER}.lora.up.weight",
            "comes twice",
        ),
        (
            {f"unet.{LAYER}.lora.up.weight": torch.ones(64, 4)},
            f"unet.{LAYER}.lora.up.weight",
            "has no counterpart",
        ),
        (
            PAIR | {f"unet.{LAYER}.lora.up.weight": torch.ones(64, 3)},
            f"unet.{LAYER}.lora.up.weight",
            "does not fit",
        ),
        (PAIR | {f"unet.{LAYER}.lora.down.weight": torch.ones(4, 9)}, f"unet.{LAYER}.lora", "does not fit"),
        (
            {
                f"unet.{CONV}.lora.down.weight": torch.ones(2, 32, 1, 1),
                f"unet.{CONV}.lora.up.weight": torch.ones(32, 2, 1, 1),
            },
            f"unet.{CONV}.lora.up.weight",
            "does not fit",
        ),
        (PAIR | NAN, f"unet.{LAYER}.lora.up.weight", "holds NaN or infinity"),
    ],
)
def test_a_tensor_that_would_not_be_applied_is_named(
    tiny: StableDiffusion, tmp_path: Path, tensors: dict[str, torch.Tensor], named: str, message: str
) -> None:
    save_file(tensors, tmp_path / LORA_FILE)
    before = {name: tensor.clone() for name, tensor in tiny.unet.state_dict().items()}
    with pytest.raises(UserError, match=message) as caught:
        merge_lora(tiny.unet, tmp_path)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny.unet.state_dict().items())


def test_files_that_are_no_lora(tiny: StableDiffusion, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such LoRA file"):
        load_lora(tiny.unet, tmp_path / "nothing")
    (tmp_path / "cut.safetensors").write_bytes(b"\x99" * 40)
    with pytest.raises(UserError, match=r"cut\.safetensors is not a safetensors file, or is cut off"):
        load_lora(tiny.unet, tmp_path / "cut.safetensors")
    (tmp_path / LORA_FILE).write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UserError, match="is a Git LFS pointer"):
        load_lora(tiny.unet, tmp_path)
    save_file({}, tmp_path / LORA_FILE)
    with pytest.raises(UserError, match="holds no tensor"):
        load_lora(tiny.unet, tmp_path)
