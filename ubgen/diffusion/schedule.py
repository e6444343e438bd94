"""Samplers as tables of coefficients, computed in float64.

Every sampler here is linear in what it combines, so one UNet call and its update are five numbers:

    x_next = a * x_ref + b * sum_k weights[k] * e_k + s * z        (e_0 is the newest guided output)

DDPM (fixed_small variance), DDIM (eta 0) and PNDM without its Runge-Kutta start (pure PLMS), each as diffusers
computes it with "leading" spacing and epsilon prediction.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ubgen.core.errors import UserError

SD15 = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "clip_sample": False,
}
"""The scheduler configuration that Stable Diffusion 1.x ships; a sampler given by name uses it."""

CLASSES = {"PNDMScheduler": "pndm", "DDIMScheduler": "ddim", "DDPMScheduler": "ddpm"}

PLMS = [(1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24)]
"""Adams-Bashforth weights of orders 1 to 4, newest output first."""


@dataclass(frozen=True)
class Call:
    """One UNet call and the update that follows it."""

    timestep: int
    a: float
    b: float
    weights: tuple[float, ...] = (1.0,)
    s: float = 0.0
    restart: bool = False  # x_ref is the x that entered the previous call (PNDM's second call)
    keep: bool = False  # later calls see this call's output


def schedule(scheduler: Any, steps: int) -> list[Call]:
    """The calls of `steps` sampling steps, in order. PNDM repeats one timestep: `steps` + 1 calls.

    `scheduler` is "pndm", "ddim" or "ddpm" (with the settings of SD 1.5), or a diffusers scheduler object of one
    of those classes, whose configuration is read. Raises UserError for settings that are not covered.
    """
    name, config = _resolve(scheduler)
    train_steps = config["num_train_timesteps"]
    ratio = train_steps // steps if 1 <= steps <= train_steps else 0
    times = [i * ratio + config["steps_offset"] for i in reversed(range(steps))]
    if not ratio or times[0] >= train_steps:
        raise UserError(f"steps: {steps} sampling steps do not fit into {train_steps} training steps")
    alphas = _alphas_cumprod(config)
    return {"pndm": _pndm, "ddim": _ddim, "ddpm": _ddpm}[name](times, ratio, alphas, config)


def training_steps(calls: int, k: int, start: int) -> list[int]:
    """The calls that carry gradient: every (calls // k)-th one from `start` on.

    As in the authors' released code, some starts give k + 1 of them when k does not divide `calls`.
    """
    if not 1 <= k <= calls:
        raise UserError(f"gradient steps: {k} do not fit into {calls} UNet calls")
    return list(range(start, calls, calls // k))


def draw_training_steps(steps: int, k: int, generator: torch.Generator, scheduler: Any = "ddpm") -> list[int]:
    """Evenly spaced calls with a random start: the paper's "5 steps out of 50" (Table 5).

    The start is uniform over all that leave room for `k` calls. PNDM's extra call widens that range by one and
    never adds a (k + 1)-th gradient step.
    """
    calls = len(schedule(scheduler, steps))
    last = calls - (calls // k) * (k - 1) - 1 if 1 <= k <= calls else 0
    start = int(torch.randint(0, last + 1, (1,), generator=generator))
    drawn = training_steps(calls, k, start)
    return drawn[:k] if calls > steps else drawn


def _pndm(times: list[int], ratio: int, alphas: Sequence[float], config: Mapping[str, Any]) -> list[Call]:
    transfers = [(t, *_ddim_step(t, ratio, alphas, config)) for t in times]
    first = transfers[0]
    calls = [Call(first[0], *first[1:], keep=True)]
    if len(times) > 1:  # the first step is taken again, with the mean of the outputs at its two ends
        calls.append(Call(times[1], *first[1:], weights=(0.5, 0.5), restart=True))
    for order, (t, a, b) in enumerate(transfers[1:], start=1):
        calls.append(Call(t, a, b, weights=PLMS[min(order, 3)], keep=True))
    return calls


def _ddim(times: list[int], ratio: int, alphas: Sequence[float], config: Mapping[str, Any]) -> list[Call]:
    return [Call(t, *_ddim_step(t, ratio, alphas, config)) for t in times]


def _ddim_step(t: int, ratio: int, alphas: Sequence[float], config: Mapping[str, Any]) -> tuple[float, float]:
    """(a, b) of the deterministic step from timestep t to t - ratio."""
    source = alphas[t]
    end = 1.0 if config["set_alpha_to_one"] else alphas[0]
    target = alphas[t - ratio] if t >= ratio else end
    return (target / source) ** 0.5, (1 - target) ** 0.5 - (target * (1 - source) / source) ** 0.5


def _ddpm(times: list[int], ratio: int, alphas: Sequence[float], config: Mapping[str, Any]) -> list[Call]:
    calls = []
    for t in times:
        source, target = alphas[t], alphas[t - ratio] if t >= ratio else 1.0
        alpha = source / target
        a, b = alpha**-0.5, -(1 - alpha) / (alpha * (1 - source)) ** 0.5
        variance = max((1 - target) / (1 - source) * (1 - alpha), 1e-20)
        calls.append(Call(t, a, b, s=variance**0.5 if t > 0 else 0.0))
    return calls


def _alphas_cumprod(config: Mapping[str, Any]) -> list[float]:
    start, end, count = config["beta_start"], config["beta_end"], config["num_train_timesteps"]
    if config.get("trained_betas") is not None:
        betas = torch.tensor(config["trained_betas"], dtype=torch.float64)
    elif config["beta_schedule"] == "scaled_linear":
        betas = torch.linspace(start**0.5, end**0.5, count, dtype=torch.float64) ** 2
    elif config["beta_schedule"] == "linear":
        betas = torch.linspace(start, end, count, dtype=torch.float64)
    else:
        raise UserError(f"scheduler: beta_schedule {config['beta_schedule']!r}; use scaled_linear or linear")
    return torch.cumprod(1 - betas, 0).tolist()


def _resolve(scheduler: Any) -> tuple[str, dict[str, Any]]:
    """Name and configuration of a sampler given by name or as a diffusers object."""
    if isinstance(scheduler, str):
        if scheduler not in CLASSES.values():
            raise UserError(f"scheduler: {scheduler!r} is not one of ddim, ddpm, pndm")
        return scheduler, dict(SD15)
    kind = type(scheduler).__name__
    if kind not in CLASSES:
        raise UserError(f"scheduler: {kind} is not supported; use one of {', '.join(CLASSES)}")
    config = {"set_alpha_to_one": True, "steps_offset": 0, **scheduler.config}
    _refuse_unsupported(CLASSES[kind], config)
    return CLASSES[kind], config


def _refuse_unsupported(name: str, config: Mapping[str, Any]) -> None:
    wanted = {"prediction_type": "epsilon", "timestep_spacing": "leading", "rescale_betas_zero_snr": False}
    if name == "pndm":
        wanted["skip_prk_steps"] = True
    else:
        wanted |= {"clip_sample": False, "thresholding": False}
    if name == "ddpm":
        wanted["variance_type"] = "fixed_small"
    for key, value in wanted.items():
        if config.get(key, value) != value:
            raise UserError(f"scheduler: {key} = {config[key]!r} is not supported; it must be {value!r}")
