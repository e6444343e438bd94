"""LoRA on the UNet, through peft, stored as diffusers stores it."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ubgen.core.errors import UserError
from ubgen.core.files import atomic_write
from ubgen.core.weights import read_header
from ubgen.diffusion.lora_files import LORA_FILE, find_lora, read_lora

LAYERS = {
    "attention": ["to_k", "to_out.0", "to_q", "to_v"],
    "transformer": ["ff.net.0.proj", "ff.net.2", "proj_in", "proj_out", "to_k", "to_out.0", "to_q", "to_v"],
}
"""What a LoRA can lie on: the projections of every attention, or every linear layer of the transformer blocks, with the
projections (1x1 convolutions in SD 1.x) into the block and out of it."""


def add_lora(
    unet: Any, rank: int, alpha: float | None = None, seed: int = 0, layers: str = "attention"
) -> list[nn.Parameter]:
    """Freeze `unet` and add a float32 LoRA to its `layers`, a name in LAYERS.

    A ~ N(0, 1/rank^2) drawn from `seed`, B = 0; the scale is alpha / rank, and alpha = rank by default.
    Returns the trainable parameters.
    """
    from peft import LoraConfig

    unet.requires_grad_(False)
    config = LoraConfig(
        r=rank,
        lora_alpha=rank if alpha is None else alpha,
        init_lora_weights="gaussian",
        target_modules=LAYERS[layers],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet.add_adapter(config)
    parameters = lora_parameters(unet)
    for parameter in parameters:
        parameter.data = parameter.data.float()
    return parameters


def lora_parameters(unet: Any) -> list[nn.Parameter]:
    """The LoRA's parameters in a fixed order (by name)."""
    return [parameter for name, parameter in sorted(unet.named_parameters()) if ".lora_" in name]


@contextmanager
def without_lora(unet: Any) -> Iterator[None]:
    """Inside, `unet` computes as if it had no LoRA. What it computed before keeps its gradient."""
    unet.disable_adapters()
    try:
        yield
    finally:
        unet.enable_adapters()


def save_lora(unet: Any, directory: str | Path) -> Path:
    """Write `unet`'s LoRA so that diffusers' `load_lora_weights(directory)` loads it, alpha included.

    Atomic: an earlier file stays whole until the new one is complete. Returns the file's path.
    """
    tensors = {name: p.detach().cpu().contiguous() for name, p in sorted(_named_lora(unet).items())}
    config = unet.peft_config["default"]
    # diffusers rebuilds the LoraConfig from this; without it, it would take alpha = rank
    adapter = {
        "unet.r": config.r,
        "unet.lora_alpha": config.lora_alpha,
        "unet.target_modules": sorted(config.target_modules),
    }
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(adapter, indent=2, sort_keys=True)}
    path = Path(directory) / LORA_FILE
    atomic_write(path, _serialized(tensors, metadata))
    return path


def restore_lora(unet: Any, path: str | Path) -> None:
    """Copy the tensors at `path` into the LoRA that `unet` has already. UserError where they do not fit."""
    from safetensors.torch import load_file

    file, parameters = find_lora(path), _named_lora(unet)
    read_header(file)
    tensors = load_file(file)
    if {n: t.shape for n, t in tensors.items()} != {n: p.shape for n, p in parameters.items()}:
        raise UserError(f"{file}: its LoRA has other layers or another rank than this UNet's")
    for name, parameter in parameters.items():
        parameter.data.copy_(tensors[name])


def load_lora(unet: Any, path: str | Path) -> None:
    """Add the LoRA at `path` (the file, or the directory that holds it) to `unet`, un-merged.

    Names of diffusers, peft and kohya are read. UserError naming the first tensor that would not be applied, or that
    is not finite.
    """
    file = find_lora(path)
    pairs = read_lora(unet, file)
    layers = list(pairs)
    ranks = {layer: pair.rank for layer, pair in pairs.items()}
    alphas = {layer: pair.alpha for layer, pair in pairs.items()}
    adapter = {"r": ranks[layers[0]], "lora_alpha": alphas[layers[0]], "target_modules": layers}
    adapter |= {"rank_pattern": ranks, "alpha_pattern": alphas}
    tensors = {f"unet.{layer}.lora_A.weight": pair.down for layer, pair in pairs.items()}
    tensors |= {f"unet.{layer}.lora_B.weight": pair.up for layer, pair in pairs.items()}
    metadata = {f"unet.{key}": value for key, value in adapter.items()}
    unet.load_lora_adapter(tensors, prefix="unet", adapter_name="default", metadata=metadata)
    if len(lora_parameters(unet)) != len(tensors):
        raise RuntimeError(f"{file}: of {len(tensors)} tensors {len(lora_parameters(unet))} were applied")


def merge_lora(unet: Any, path: str | Path) -> None:
    """Add the LoRA at `path` into `unet`'s own weights, in float32; no LoRA module remains."""
    dtype = unet.dtype
    if dtype != torch.float32:
        unet.to(torch.float32)
    load_lora(unet, path)
    unet.fuse_lora(lora_scale=1.0, safe_fusing=True)
    unet.unload_lora()
    if dtype != torch.float32:
        unet.to(dtype)


def _named_lora(unet: Any) -> dict[str, nn.Parameter]:
    """The LoRA's parameters under the names that diffusers gives them in files."""
    renamed = ((".lora_A.default.", ".lora.down."), (".lora_B.default.", ".lora.up."))
    return {
        f"unet.{name.replace(old, new)}": parameter
        for name, parameter in unet.named_parameters()
        for old, new in renamed
        if old in name
    }


def _serialized(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> bytes:
    """A safetensors file whose bytes depend on the content only: the library's own metadata order is random."""
    from safetensors.torch import save

    data = save(tensors)
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps({"__metadata__": metadata, **json.loads(data[8:end])}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # the format aligns the tensors to 8 bytes
    return len(header).to_bytes(8, "little") + header + data[end:]
