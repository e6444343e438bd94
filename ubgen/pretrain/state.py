"""What training changes, and how one update changes it: timm's optimiser, schedule, mixup, loss and moving average."""

import copy
import hashlib
import io
import random
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ubgen.core.errors import UserError, first_line
from ubgen.core.files import atomic_write
from ubgen.core.weights import require_timm_model
from ubgen.pretrain.config import SHORT_RUN, PretrainConfig

_PRECISIONS = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def model_options(config: PretrainConfig, classes: int) -> dict[str, Any]:
    """What `timm.create_model` needs beside the name, to build the network that the weights fit."""
    options: dict[str, Any] = {"num_classes": classes}
    settings = timm.get_pretrained_cfg(config.model)
    if settings is not None and settings.fixed_input_size:
        options["img_size"] = config.image_size
    if config.patch_size is not None:
        options["patch_size"] = config.patch_size
    return options


def build_model(config: PretrainConfig, classes: int) -> nn.Module:
    """The untrained network, from the run's seed. UserError for a name that timm does not know, or a wrong size."""
    require_timm_model(config.model, "model")
    torch.manual_seed(config.seed)
    try:
        model = timm.create_model(
            config.model, pretrained=False, drop_path_rate=config.drop_path, **model_options(config, classes)
        )
        sample = torch.empty(1, 3, config.image_size, config.image_size, device="meta")
        copy.deepcopy(model).to("meta").eval()(sample)  # the sizes alone
        return model
    except (TypeError, AssertionError, ValueError, RuntimeError) as error:
        raise UserError(
            f"model {config.model}: image_size, patch_size or drop_path does not fit it ({first_line(error)})"
        ) from None


def build_optimizer(config: PretrainConfig, model: nn.Module) -> torch.optim.Optimizer:
    """AdamW; timm takes the weight decay from biases, 1-d tensors, and what `no_weight_decay` of the network names."""
    return create_optimizer_v2(
        model, opt="adamw", lr=config.lr, weight_decay=config.weight_decay, betas=config.betas, eps=config.eps
    )


def build_scheduler(config: PretrainConfig, optimizer: torch.optim.Optimizer, updates_per_epoch: int) -> Any:
    """Linear from 0 over the warm-up, then half a cosine down to `min_lr` over the rest, for each update."""
    return create_scheduler_v2(
        optimizer,
        sched="cosine",
        num_epochs=config.epochs - config.warmup_epochs,
        min_lr=config.min_lr,
        warmup_lr=0.0,
        warmup_epochs=config.warmup_epochs,
        warmup_prefix=True,
        step_on_epochs=False,
        updates_per_epoch=updates_per_epoch,
    )[0]


def build_mixup(config: PretrainConfig, classes: int) -> Mixup | None:
    if not config.mixup and not config.cutmix:
        return None
    return Mixup(
        mixup_alpha=config.mixup,
        cutmix_alpha=config.cutmix,
        switch_prob=config.mix_switch,
        label_smoothing=config.label_smoothing,
        num_classes=classes,
    )


class MovingAverage:
    """timm's ModelEmaV3 of everything in the network, with the rule for short runs: min(decay, (1 + n) / (10 + n))."""

    def __init__(self, config: PretrainConfig, model: nn.Module, updates: int) -> None:
        self.warmup = config.ema_warmup == "on" or (config.ema_warmup == "auto" and updates < SHORT_RUN)
        # timm's 1 - (1 + s / gamma) ** -power, with gamma 9 and power 1, is s / (s + 9): the rule at s = n + 1
        self.ema = ModelEmaV3(
            model, config.ema_decay, use_warmup=self.warmup, warmup_gamma=9.0, warmup_power=1.0
        )

    @property
    def model(self) -> nn.Module:
        return self.ema.module

    def decay(self, done: int) -> float:
        """After `done` updates."""
        return self.ema.get_decay(self._step(done))

    def update(self, model: nn.Module, done: int) -> None:
        self.ema.update(model, self._step(done))

    def _step(self, done: int) -> int | None:
        return done + 2 if self.warmup else None  # timm takes one off


@dataclass
class State:
    """One process's part; every process holds the same weights."""

    config: PretrainConfig
    device: torch.device
    model: nn.Module
    """What is saved."""
    network: nn.Module
    """What is called in training: the same weights, compiled and distributed."""
    average: MovingAverage
    optimizer: torch.optim.Optimizer
    scheduler: Any
    scaler: torch.amp.GradScaler
    mixup: Mixup | None
    loss: nn.Module

    def autocast(self) -> Any:
        kind = _PRECISIONS[self.config.precision]
        return torch.autocast(self.device.type, kind, enabled=self.config.precision != "no")

    def on_device(self, images: Tensor) -> Tensor:
        layout = torch.channels_last if self.config.channels_last else torch.contiguous_format
        return images.to(self.device, memory_format=layout, non_blocking=True)


def build_state(
    config: PretrainConfig, classes: int, updates_per_epoch: int, device: torch.device, processes: int
) -> State:
    model = build_model(config, classes).to(device)
    if config.channels_last:
        model = model.to(memory_format=torch.channels_last)
    average = MovingAverage(config, model, updates_per_epoch * config.epochs)
    network: Any = torch.compile(model) if config.compile else model
    if processes > 1:
        network = DistributedDataParallel(network, device_ids=[device] if device.type == "cuda" else None)
    optimizer = build_optimizer(config, model)
    mixup = build_mixup(config, classes)
    return State(
        config,
        device,
        model,
        network,
        average,
        optimizer,
        build_scheduler(config, optimizer, updates_per_epoch),
        torch.amp.GradScaler(device.type, enabled=config.precision == "fp16"),
        mixup,
        SoftTargetCrossEntropy() if mixup else LabelSmoothingCrossEntropy(config.label_smoothing),
    )


def seed_update(seed: int, update: int, rank: int) -> None:
    """Mixup and stochastic depth draw from the global generators: seeded so, an update needs no earlier one."""
    digest = hashlib.blake2b(f"update {seed} {update} {rank}".encode(), digest_size=8).digest()
    value = int.from_bytes(digest, "little")
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.manual_seed(value % 2**63)


def update(state: State, batches: list[dict[str, Any]], done: int, rank: int) -> Tensor:
    """One step of the optimiser after `done` others, over the batches of an accumulation; the mean loss, detached."""
    seed_update(state.config.seed, done, rank)
    state.scheduler.step_update(done)
    state.network.train()
    total = torch.zeros((), device=state.device)
    for number, batch in enumerate(batches):
        with _without_exchange(state.network, number < len(batches) - 1):
            loss = _loss(state, batch) / len(batches)
            state.scaler.scale(loss).backward()
        total += loss.detach()
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    state.average.update(state.model, done + 1)
    return total


def _loss(state: State, batch: dict[str, Any]) -> Tensor:
    images, labels = state.on_device(batch["images"]), batch["labels"].to(state.device)
    if state.mixup is not None:
        even = len(labels) - len(labels) % 2  # odd where a broken image was left out
        images, labels = state.mixup(images[:even], labels[:even])
    with state.autocast():
        logits = state.network(images)
    return state.loss(logits.float(), labels)


def _without_exchange(network: nn.Module, postponed: bool) -> AbstractContextManager[Any]:
    """Processes exchange gradients at the last batch of an accumulation."""
    if postponed and isinstance(network, DistributedDataParallel):
        return network.no_sync()
    return nullcontext()


def save_checkpoint(path: Path, state: State, done: int) -> None:
    buffer = io.BytesIO()
    torch.save({"done": done, **{name: part.state_dict() for name, part in _parts(state).items()}}, buffer)
    atomic_write(path, buffer.getvalue())


def restore_checkpoint(path: Path, state: State) -> int:
    """The updates that were done. UserError for a damaged file."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        for name, part in _parts(state).items():
            part.load_state_dict(saved[name])
        return int(saved["done"])
    except OSError:
        raise
    except Exception as error:
        raise UserError(
            f"{path}: damaged checkpoint ({first_line(error)}); remove it to start from the beginning"
        ) from error


def _parts(state: State) -> dict[str, Any]:
    return {
        "model": state.model,
        "average": state.average.model,
        "optimizer": state.optimizer,
        "scaler": state.scaler,
    }
