"""What the small training runs share: optimiser schedule, weight averaging, progress and resume."""

import math
import random
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

SAVE_EVERY = 500


def seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def cosine(step: int, steps: int, warmup: int = 100) -> float:
    """Learning-rate factor: linear warm-up, then half a cosine down to 1 %."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


class Report:
    """A line with the loss and the time left every half minute: two networks train side by side, so no bars."""

    def __init__(self, title: str, steps: int, start: int) -> None:
        self.title, self.steps, self.start = title, steps, start
        self.began = self.shown = time.monotonic()

    def __call__(self, step: int, loss: Tensor) -> None:
        now, done = time.monotonic(), step + 1
        if now - self.shown < 30 and done < self.steps:
            return
        self.shown = now
        left = (now - self.began) / (done - self.start) * (self.steps - done)
        print(
            f"{self.title}  {done}/{self.steps}  loss {loss.item():.4f}  {left / 60:.0f} min left", flush=True
        )


def fit(
    title: str,
    model: nn.Module,
    loss_of_step: Callable[[torch.Generator], Tensor],
    *,
    steps: int,
    lr: float,
    seed: int,
    checkpoint: Path,
    average: float,
) -> None:
    """AdamW with a cosine schedule. Continues from `checkpoint` (written every few minutes) when it exists.

    The batch of step i is drawn from a generator seeded by (seed, i), so a continued run sees the batches that
    an uninterrupted one would have seen. The model ends as the exponential moving average of its weights, with
    factor `average`.
    """
    optimiser = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    averaged = {k: v.detach().clone() for k, v in model.state_dict().items()}
    start = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        averaged, start = state["averaged"], state["step"]
    report = Report(title, steps, start)
    for step in range(start, steps):
        for group in optimiser.param_groups:
            group["lr"] = lr * cosine(step, steps)
        loss = loss_of_step(torch.Generator().manual_seed(seed * 1_000_003 + step))
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        for k, v in model.state_dict().items():
            decay = min(average, (step + 1) / (step + 10))
            averaged[k].lerp_(v, 1 - decay) if v.is_floating_point() else averaged[k].copy_(v)
        report(step, loss)
        if (step + 1) % SAVE_EVERY == 0:
            state = {
                "model": model.state_dict(),
                "optimiser": optimiser.state_dict(),
                "averaged": averaged,
                "step": step + 1,
            }
            torch.save(state, checkpoint.with_suffix(".tmp"))
            checkpoint.with_suffix(".tmp").rename(checkpoint)
    model.load_state_dict(averaged)
