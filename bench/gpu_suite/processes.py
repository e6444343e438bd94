"""How the suite starts its processes: forked from one that has imported the libraries already and touched no GPU."""

import contextlib
import ctypes
import importlib
import multiprocessing
import os
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

START = "UBGEN_SUITE_START"


def context() -> Any:
    """ "fork", unless the environment names another start method."""
    return multiprocessing.get_context(os.environ.get(START, "fork"))


def choose_start() -> bool:
    """Settle on a way in which a child can use the GPU; False when there is none.

    A library that asked the driver for its devices has spoilt this process for forking. Then each child begins anew,
    and imports everything again.
    """
    for start in ("fork", "spawn"):
        os.environ[START] = start
        process = context().Process(target=_use_gpu)
        process.start()
        process.join()
        if process.exitcode == 0:
            return True
    return False


def _use_gpu() -> None:
    torch.zeros(1, device="cuda")


def die_with_parent() -> None:
    """Called first in a child: when its parent is killed, so is it (Linux)."""
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def import_libraries() -> None:
    """What most parts need and what takes seconds. Not torch._inductor: it starts processes of its own."""
    for module, *names in (
        ("torch._dynamo",),
        ("diffusers", "AutoencoderKL", "PNDMScheduler", "StableDiffusionPipeline", "UNet2DConditionModel"),
        ("open_clip",),
        ("peft",),
    ):
        with contextlib.suppress(ImportError):  # the parts that need it will say so
            for name in names:  # diffusers imports its classes when they are first asked for
                getattr(importlib.import_module(module), name)
            importlib.import_module(module)
    with contextlib.suppress(ImportError):
        importlib.import_module("diffusers").utils.logging.set_verbosity_error()  # it warns of every cast


def result_of(function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(*arguments)`, computed in another process. RuntimeError where that fails."""
    ours, theirs = context().Pipe()
    process = context().Process(target=_send, args=(theirs, function, arguments))
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        raise RuntimeError(f"{function.__name__} failed in its process; see suite.log") from None
    finally:
        process.join()


def _send(pipe: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    die_with_parent()
    pipe.send(function(*arguments))
