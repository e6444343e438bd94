"""Checkpoints: a directory each, complete or absent."""

import io
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save

from ubgen.core.errors import UserError
from ubgen.core.files import atomic_write
from ubgen.diffusion import LORA_FILE, restore_lora, save_lora
from ubgen.train.state import TrainState

DISCRIMINATOR_FILE = "discriminator.safetensors"
STATE_FILE = "state.pt"


def save_checkpoint(directory: Path, state: TrainState, done: int, warmup: int, keep: int) -> Path:
    """Write `directory`/<done>/: the weights, and all else that the next update needs; then drop all but the newest
    `keep`, or none for 0.

    The files are written under a temporary name first, so a failure (a full disk, a kill) leaves the earlier
    checkpoints as they were.
    """
    directory.mkdir(exist_ok=True)
    final = directory / f"{done:06d}"
    temporary = directory / f".writing-{final.name}"
    try:
        temporary.mkdir()
        save_weights(temporary, state)
        atomic_write(temporary / STATE_FILE, _state_bytes(state, done, warmup))
        shutil.rmtree(final, ignore_errors=True)
        os.rename(temporary, final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for old in list_checkpoints(directory)[:-keep] if keep else []:
        shutil.rmtree(old)
    return final


def save_weights(directory: Path, state: TrainState) -> None:
    """The LoRA in diffusers format, and the discriminator if there is one."""
    save_lora(state.sd.unet, directory)
    if state.adversary is not None:
        tensors = {name: t.detach().cpu() for name, t in state.adversary.network.state_dict().items()}
        atomic_write(directory / DISCRIMINATOR_FILE, save(tensors))


def list_checkpoints(directory: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(path for path in directory.glob("[0-9]*") if (path / STATE_FILE).is_file())


def restore_checkpoint(path: Path, state: TrainState) -> tuple[int, int]:
    """Put everything back as it was; returns the updates done, and the warm-up's length as far as it was known.

    UserError for a damaged checkpoint.
    """
    # to the host: what is loaded below goes where its network lies, and the optimisers count on the host
    saved = _readable(path, lambda: torch.load(path / STATE_FILE, map_location="cpu", weights_only=True))
    restore_lora(state.sd.unet, path / LORA_FILE)
    if state.adversary is not None:
        saved_network = _readable(path, lambda: load_file(path / DISCRIMINATOR_FILE))
        state.adversary.network.load_state_dict(saved_network)
    for name, part in _stateful(state).items():
        part.load_state_dict(saved[name])
    return int(saved["done"]), int(saved["warmup"])


def _readable(checkpoint: Path, read: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `read` gives. UserError where a file's content makes it fail, by errors of many kinds."""
    try:
        return read()
    except Exception as error:
        if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
            raise  # the disk's, and perhaps gone next time
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{checkpoint}: damaged checkpoint ({reason}); remove it to continue from an earlier one"
        ) from error


def remove_unfinished(directory: Path) -> None:
    """Remove what a killed process left behind."""
    for leftover in directory.glob(".writing-*"):
        shutil.rmtree(leftover)


def _stateful(state: TrainState) -> dict[str, Any]:
    """What is in a checkpoint beside the weights."""
    parts = {
        "generator_optimizer": state.generator_optimizer,
        "discriminator_optimizer": state.adversary and state.adversary.optimizer,
        "discriminator_health": state.adversary and state.adversary.health,
        "scaler": state.scaler,
        "average": state.average,
        "class_moments": state.class_moments,
    }
    return {name: part for name, part in parts.items() if part is not None}


def _state_bytes(state: TrainState, done: int, warmup: int) -> bytes:
    buffer = io.BytesIO()
    parts = {name: part.state_dict() for name, part in _stateful(state).items()}
    torch.save({"done": done, "warmup": warmup, **parts}, buffer)
    return buffer.getvalue()
