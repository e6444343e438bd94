import json
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, PNDMScheduler

from ubgen.core.errors import UserError
from ubgen.diffusion import draw_training_steps, sample, schedule, training_steps
from ubgen.diffusion.schedule import SD15

GOLDEN = Path(__file__).parents[2] / "golden" / "samplers"
PEERS = {"pndm": PNDMScheduler, "ddim": DDIMScheduler, "ddpm": DDPMScheduler}


@pytest.mark.parametrize("name", ["pndm", "ddpm"])
def test_coefficients_equal_the_recorded_table(name: str) -> None:
    recorded = json.loads((GOLDEN / f"{name}_sd15_50steps.json").read_text())["calls"]
    calls = schedule(name, 50)
    assert [call.timestep for call in calls] == [row["unet_timestep"] for row in recorded]
    for call, row in zip(calls, recorded, strict=True):
        assert (call.a, call.b) == pytest.approx((row["a"], row["b"]), rel=1e-11)
        assert call.s == pytest.approx(row.get("s", 0.0), rel=1e-11)
        assert call.weights == pytest.approx(row.get("weights", [1.0]), rel=1e-14)


def test_fifty_pndm_steps_are_51_calls_and_restart_once() -> None:
    calls = schedule("pndm", 50)
    assert len(calls) == 51
    assert [call.timestep for call in calls[:4]] == [981, 961, 961, 941]
    assert [index for index, call in enumerate(calls) if call.restart] == [1]
    assert all(sum(call.weights) == pytest.approx(1) for call in calls)


def field(x: torch.Tensor, timestep: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
    """A smooth stand-in for a UNet: differs between the two guidance branches and over time."""
    return torch.tanh(0.7 * x + context.mean((1, 2)).view(-1, 1, 1, 1)) + 1e-3 * timestep.view(-1, 1, 1, 1)


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 25, 50])
@pytest.mark.parametrize("name", ["pndm", "ddim", "ddpm"])
def test_sampling_equals_diffusers(name: str, steps: int) -> None:
    torch.manual_seed(steps)
    x, cond, uncond = torch.randn(2, 4, 8, 8), torch.randn(2, 3, 5), torch.randn(1, 3, 5)
    peer = PEERS[name](**{key: value for key, value in SD15.items() if key in PEERS[name]().config})
    peer.set_timesteps(steps)
    expected, noise = x, []
    for t in peer.timesteps:
        outputs = [field(expected, t.expand(2), c.expand_as(cond)) for c in (uncond, cond)]
        guided = outputs[0] + 2.5 * (outputs[1] - outputs[0])
        torch.manual_seed(int(t))
        noise.append(torch.randn(x.shape))
        torch.manual_seed(int(t))
        expected = peer.step(guided, t, expected).prev_sample
    options = {"steps": steps, "guidance": 2.5, "step_noise": torch.stack(noise)}
    ours = sample(field, name, x, cond, uncond, **options)
    assert torch.allclose(ours, expected, atol=2e-5, rtol=2e-5)
    assert torch.equal(ours, sample(field, peer, x, cond, uncond, **options))


def test_scheduler_object_gives_its_own_noise_schedule() -> None:
    linear = DDIMScheduler(beta_schedule="linear", clip_sample=False, steps_offset=1)
    calls = schedule(linear, 10)
    assert calls[0].a != schedule("ddim", 10)[0].a
    assert calls[-1].a == pytest.approx(float(linear.alphas_cumprod[1]) ** -0.5)  # ends at alpha = 1


@pytest.mark.parametrize(
    ("scheduler", "reason"),
    [
        (EulerDiscreteScheduler(), "EulerDiscreteScheduler"),
        (DDIMScheduler(prediction_type="v_prediction", clip_sample=False), "prediction_type"),
        (DDIMScheduler(timestep_spacing="trailing", clip_sample=False), "timestep_spacing"),
        (DDPMScheduler(), "clip_sample"),
        (DDPMScheduler(variance_type="fixed_large", clip_sample=False), "variance_type"),
        (PNDMScheduler(), "skip_prk_steps"),
        (PNDMScheduler(skip_prk_steps=True, beta_schedule="squaredcos_cap_v2"), "beta_schedule"),
        ("euler", "'euler'"),
    ],
)
def test_other_settings_are_refused(scheduler: object, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        schedule(scheduler, 10)


@pytest.mark.parametrize("steps", [0, -1, 1000, 2000])
def test_impossible_step_counts_are_refused(steps: int) -> None:
    with pytest.raises(UserError, match="steps"):
        schedule("ddpm", steps)


def test_training_steps_are_every_interval_to_the_end() -> None:
    assert training_steps(50, 5, 3) == [3, 13, 23, 33, 43]
    assert training_steps(10, 3, 1) == [1, 4, 7]
    assert training_steps(10, 3, 0) == [0, 3, 6, 9]
    with pytest.raises(UserError, match="gradient steps"):
        training_steps(10, 11, 0)


@pytest.mark.parametrize(("sampler", "last_start"), [("ddpm", 9), ("pndm", 10)])
def test_drawn_steps_cover_every_start(sampler: str, last_start: int) -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = [draw_training_steps(50, 5, generator, sampler) for _ in range(300)]
    assert {steps[0] for steps in drawn} == set(range(last_start + 1))
    assert {len(steps) for steps in drawn} == {5}
    assert max(max(steps) for steps in drawn) == 40 + last_start
