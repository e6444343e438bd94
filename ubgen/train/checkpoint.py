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
from ubgen.core.stage import atomic_write
from ubgen.diffusion import LORA_FILE, restore_lora, save_lora
from ubgen.train.players import Players

DISCRIMINATOR_FILE = "discriminator.safetensors"
STATE_FILE = "state.pt"


def save_checkpoint(directory: Path, players: Players, done: int, keep: int) -> Path:
    """Write `directory`/<done>/ with both players, their optimisers and the loss scale; then drop old ones.

    The files are written under a temporary name first, so a failure (a full disk, a kill) leaves the earlier
    checkpoints as they were.
    """
    directory.mkdir(exist_ok=True)
    final = directory / f"{done:06d}"
    temporary = directory / f".writing-{final.name}"
    try:
        temporary.mkdir()
        save_players(temporary, players)
        atomic_write(temporary / STATE_FILE, _state_bytes(players, done))
        shutil.rmtree(final, ignore_errors=True)
        os.rename(temporary, final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for old in list_checkpoints(directory)[:-keep]:
        shutil.rmtree(old)
    return final


def save_players(directory: Path, players: Players) -> None:
    """The LoRA in diffusers format, and the discriminator where there is one."""
    save_lora(players.sd.unet, directory)
    if players.adversary is not None:
        tensors = {name: t.detach().cpu() for name, t in players.adversary.state_dict().items()}
        atomic_write(directory / DISCRIMINATOR_FILE, save(tensors))


def list_checkpoints(directory: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(path for path in directory.glob("[0-9]*") if (path / STATE_FILE).is_file())


def restore_checkpoint(path: Path, players: Players) -> int:
    """Put everything back as it was; returns the number of updates done. UserError for a damaged checkpoint."""
    adversary = players.adversary
    # to the host: what is loaded below goes where its network lies, and the optimisers count on the host
    state = _readable(path, lambda: torch.load(path / STATE_FILE, map_location="cpu", weights_only=True))
    restore_lora(players.sd.unet, path / LORA_FILE)
    players.generator_optimizer.load_state_dict(state["generator_optimizer"])
    players.scaler.load_state_dict(state["scaler"])
    if players.average is not None:
        players.average.load_state_dict(state["average"])
    if players.pace is not None:
        players.pace.load_state_dict(state["pace"])
    if adversary is not None:
        adversary.load_state_dict(_readable(path, lambda: load_file(path / DISCRIMINATOR_FILE)))
        adversary.optimizer.load_state_dict(state["discriminator_optimizer"])
    return int(state["done"])


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
    """Sweep up what a killed process left behind."""
    for leftover in directory.glob(".writing-*"):
        shutil.rmtree(leftover)


def _state_bytes(players: Players, done: int) -> bytes:
    adversary = players.adversary
    state: dict[str, Any] = {
        "done": done,
        "generator_optimizer": players.generator_optimizer.state_dict(),
        "discriminator_optimizer": None if adversary is None else adversary.optimizer.state_dict(),
        "scaler": players.scaler.state_dict(),
        "average": None if players.average is None else players.average.state_dict(),
        "pace": None if players.pace is None else players.pace.state_dict(),
    }
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()
