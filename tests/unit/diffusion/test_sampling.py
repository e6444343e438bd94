from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ubgen.core.errors import UserError
from ubgen.diffusion import (
    StableDiffusion,
    add_lora,
    decode,
    load_lora,
    lora_parameters,
    merge_lora,
    rollout,
    sample,
)


def lora_gradients(
    sd: StableDiffusion, data: dict, grad_steps: list[int], checkpoint: bool = False, **options: Any
) -> dict[str, Tensor]:
    """Run the recorded rollout and loss; gradients by module path."""
    for parameter in lora_parameters(sd.unet):
        parameter.requires_grad_(True).grad = None
    images = decode(sd.vae, recorded(sd, data, grad_steps, **options), checkpoint)
    (images * data["weight"]).sum().backward()
    return {
        name.replace(".default.weight", ""): parameter.grad.clone()
        for name, parameter in sd.unet.named_parameters()
        if ".lora_" in name
    }


def recorded(sd: StableDiffusion, data: dict, grad_steps: list[int], **options: Any) -> Tensor:
    return rollout(
        sd.unet,
        "ddpm",
        data["init_latents"],
        data["prompt_embeds"],
        data["negative_prompt_embeds"],
        steps=10,
        guidance=2.0,
        grad_steps=grad_steps,
        step_noise=data["noise"],
        **options,
    )


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize(("prefix", "grad_steps"), [("grad", [1, 4, 7]), ("grad_alt", [0, 3, 6, 9])])
def test_rollout_equals_the_released_code(
    tiny: StableDiffusion,
    reference: Path,
    recorded_rollout: dict,
    prefix: str,
    grad_steps: list[int],
) -> None:
    load_lora(tiny.unet, reference / "model" / "lora")
    latents = recorded(tiny, recorded_rollout, grad_steps)
    assert (latents - recorded_rollout["latents"][-1]).abs().max() < 1e-4
    assert (decode(tiny.vae, latents) - recorded_rollout["images"]).abs().max() < 1e-4
    gradients = lora_gradients(tiny, recorded_rollout, grad_steps)
    assert len(gradients) == 64
    for name, gradient in gradients.items():
        assert relative(gradient, recorded_rollout[f"{prefix}.{name}"]) < 1e-3, name


def test_every_latent_on_the_way_equals_the_released_code(
    tiny: StableDiffusion, reference: Path, recorded_rollout: dict
) -> None:
    load_lora(tiny.unet, reference / "model" / "lora")
    data, inputs, outputs = recorded_rollout, [], []

    def spy(latents: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        inputs.append(latents[:2].clone())
        outputs.append(tiny.unet(latents, timestep, context).sample)
        return outputs[-1]

    sample(
        spy,
        "ddpm",
        data["init_latents"],
        data["prompt_embeds"],
        data["negative_prompt_embeds"][:1],
        steps=10,
        guidance=2.0,
        step_noise=data["noise"],
    )
    assert (torch.stack(inputs[1:]) - data["latents"][:-1]).abs().max() < 1e-4
    assert (torch.stack(outputs)[:, :2] - data["eps_uncond"]).abs().max() < 1e-4
    assert (torch.stack(outputs)[:, 2:] - data["eps_text"]).abs().max() < 1e-4


def test_synthesis_equals_the_released_code(tiny: StableDiffusion, reference: Path) -> None:
    data = load_file(reference / "synthesis.safetensors")
    merge_lora(tiny.unet, reference / "model" / "lora")
    latents = sample(
        tiny.unet,
        "pndm",
        data["init_latents"],
        data["prompt_embeds"],
        data["negative_prompt_embeds"],
        steps=50,
        guidance=2.0,
    )
    assert (latents - data["latents"][-1]).abs().max() < 1e-4
    pixels = (decode(tiny.vae, latents).clamp(0, 1) * 255).round().permute(0, 2, 3, 1)
    off = (pixels - data["images_uint8"].float()).abs()
    assert off.max() <= 1
    assert (off > 0).float().mean() <= 0.01


def test_prompt_embeddings_equal_the_released_code(tiny: StableDiffusion, recorded_rollout: dict) -> None:
    for ids, embeddings in (("prompt_ids", "prompt_embeds"), ("negative_ids", "negative_prompt_embeds")):
        ours = tiny.text_encoder(recorded_rollout[ids]).last_hidden_state
        assert (ours - recorded_rollout[embeddings][: len(ours)]).abs().max() < 1e-5


def test_checkpointing_changes_no_bit(tiny: StableDiffusion, reference: Path, recorded_rollout: dict) -> None:
    load_lora(tiny.unet, reference / "model" / "lora")
    plain = lora_gradients(tiny, recorded_rollout, [1, 4, 7])
    tiny.unet.enable_gradient_checkpointing()
    tiny.unet.train()
    checkpointed = lora_gradients(tiny, recorded_rollout, [1, 4, 7], checkpoint=True)
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)


def test_detached_unet_input_is_the_other_rule(
    tiny: StableDiffusion, reference: Path, recorded_rollout: dict
) -> None:
    load_lora(tiny.unet, reference / "model" / "lora")
    both = [
        torch.cat([g.flatten() for g in lora_gradients(tiny, recorded_rollout, [1, 4, 7], **option).values()])
        for option in ({}, {"detach_unet_input": True})
    ]
    assert relative(both[1], both[0]) == pytest.approx(0.889, abs=0.001)  # recorded with the released code


def test_nothing_needs_a_gradient_before_the_first_training_step(tiny: StableDiffusion) -> None:
    add_lora(tiny.unet, rank=2)
    graph = []

    def spy(latents: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        output = tiny.unet(latents, timestep, context).sample
        graph.append((latents.requires_grad, output.requires_grad))
        return output

    x, context = torch.randn(1, 4, 8, 8), torch.randn(1, 16, 32)
    latents = rollout(spy, "pndm", x, context, context, steps=4, guidance=2.0, grad_steps=[2])
    assert graph[:2] == [(False, False)] * 2
    assert graph[2] == (False, True)
    assert graph[3:] == [(False, False)] * 2  # no graph is built where the UNet is not trained
    assert latents.requires_grad


def test_pndm_rollout_equals_pndm_sampling(tiny: StableDiffusion) -> None:
    add_lora(tiny.unet, rank=2)
    x, cond, uncond = torch.randn(2, 4, 8, 8), torch.randn(2, 16, 32), torch.randn(1, 16, 32)
    options = {"steps": 6, "guidance": 3.0}
    trained = rollout(tiny.unet, "pndm", x, cond, uncond, grad_steps=[0, 3], **options)
    assert torch.allclose(trained, sample(tiny.unet, "pndm", x, cond, uncond, **options), atol=1e-5)


def test_rollout_gradient_equals_finite_differences() -> None:
    """All calls trained: the whole chain, PNDM's history included, is one differentiable function of the weight."""
    x = torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    context = torch.ones(1, 1, 1)

    def final(weight: Tensor) -> Tensor:
        def net(latents: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
            return torch.tanh(weight * latents)

        return rollout(net, "pndm", x, context, context, steps=6, guidance=2.0, grad_steps=range(7)).sum()

    weight = torch.tensor(0.8, requires_grad=True)
    final(weight).backward()
    with torch.no_grad():
        numeric = (final(torch.tensor(0.82)) - final(torch.tensor(0.78))) / 0.04
    assert weight.grad.item() == pytest.approx(numeric.item(), rel=1e-2)


def test_ddpm_noise_follows_its_generator(tiny: StableDiffusion) -> None:
    x, context = torch.randn(1, 4, 8, 8), torch.randn(1, 16, 32)

    def run(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return sample(tiny.unet, "ddpm", x, context, context, steps=3, guidance=2.0, generator=generator)

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))


def test_half_precision_network_keeps_float32_latents(tiny: StableDiffusion) -> None:
    tiny.unet.to(torch.bfloat16)
    x, context = torch.randn(1, 4, 8, 8), torch.randn(1, 16, 32, dtype=torch.bfloat16)
    assert sample(tiny.unet, "pndm", x, context, context, steps=3, guidance=2.0).dtype == torch.float32


def test_gradient_steps_outside_the_chain_are_refused(tiny: StableDiffusion) -> None:
    x, context = torch.randn(1, 4, 8, 8), torch.randn(1, 16, 32)
    with pytest.raises(UserError, match="grad_steps"):
        rollout(tiny.unet, "ddpm", x, context, context, steps=3, guidance=2.0, grad_steps=[3])


def test_decoding_does_not_clamp(tiny: StableDiffusion) -> None:
    images = decode(tiny.vae, 20 * torch.randn(2, 4, 8, 8))
    assert images.shape == (2, 3, 16, 16)
    assert images.min() < 0 or images.max() > 1
