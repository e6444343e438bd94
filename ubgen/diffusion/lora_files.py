"""LoRA files in the naming of diffusers, peft or kohya: every tensor is used, or the file is refused with its name."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ubgen.core.errors import UserError
from ubgen.core.weights import read_header, read_json_object, require_finite

LORA_FILE = "pytorch_lora_weights.safetensors"
_PEFT = "base_model.model."
_PARTS = {
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",  # diffusers
    "_lora.down.weight": "down",
    "_lora.up.weight": "up",  # diffusers' attention processors of 2023
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",  # peft
    ".lora_A.default.weight": "down",
    ".lora_B.default.weight": "up",
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",  # kohya
    ".alpha": "alpha",
}
_OTHER_KINDS = {
    "dora_scale": "DoRA",
    "magnitude": "DoRA",
    "hada_": "LoHa",
    "lokr_": "LoKr",
    ".lora_mid": "LoRA of Tucker's form",
    ".diff": "full difference",
    ".lora.bias": "LoRA with biases",
    "lora_B.bias": "LoRA with biases",
}


def find_lora(path: str | Path) -> Path:
    """The LoRA's file at `path`, which is the file or its directory. UserError when there is none."""
    file = Path(path) / LORA_FILE if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise UserError(f"{file}: no such LoRA file")
    return file


@dataclass(frozen=True)
class LoraPair:
    """alpha / rank * up @ down is added to a layer's weight (O,I) or (O,I,k,k); `down` (r,I,...), `up` (O,r,...)."""

    down: torch.Tensor
    up: torch.Tensor
    alpha: float

    @property
    def rank(self) -> int:
        return len(self.down)


def read_lora(unet: Any, path: str | Path) -> dict[str, LoraPair]:
    """The LoRA in the file `path` by the name of the layer in `unet`, which may lie on the meta device.

    UserError naming the first tensor that fits no layer, has no counterpart, is of a kind that cannot be merged
    (DoRA, LoHa, LoKr, full differences), belongs to a text encoder, or is not finite.
    """
    from safetensors import safe_open

    file = find_lora(path)
    read_header(file)
    with safe_open(file, "pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in sorted(opened.keys())}
        about = json.loads((opened.metadata() or {}).get("lora_adapter_metadata", "{}"))
    if not tensors:
        raise UserError(f"{file} holds no tensor")
    require_finite(tensors.items(), file)
    if any(name.startswith(_PEFT) for name in tensors):
        about = _of_peft(file)
    layers = {name: module for name, module in unet.named_modules() if hasattr(module, "weight")}
    flat = {name.replace(".", "_"): name for name in layers}
    found: dict[str, dict[str, torch.Tensor]] = {}
    origin: dict[str, str] = {}
    for name, tensor in tensors.items():
        layer, part = _layer_and_part(name, flat, file)
        if layer not in layers:
            raise UserError(f"{file}: tensor {name!r} fits no layer of this UNet")
        if part in found.setdefault(layer, {}):
            raise UserError(f"{file}: tensor {name!r} comes twice, under two names")
        found[layer][part] = tensor
        origin[layer] = name
    return {
        layer: _pair(layers[layer], layer, parts, about, f"{file}: tensor {origin[layer]!r}")
        for layer, parts in found.items()
    }


def _layer_and_part(name: str, flat: Mapping[str, str], file: Path) -> tuple[str, str]:
    """("mid_block.attentions.0.proj_in", "down", "up" or "alpha") of a tensor's name in a file."""
    if name.startswith(("text_encoder", "lora_te", "te_", "text_model")):
        raise UserError(
            f"{file}: tensor {name!r} belongs to a text encoder; only LoRAs of the UNet alone are supported"
        )
    for sign, kind in _OTHER_KINDS.items():
        if sign in name:
            raise UserError(
                f"{file}: tensor {name!r} is part of a {kind}, which is not supported; only plain LoRAs are"
            )
    for ending, part in _PARTS.items():
        if name.endswith(ending):
            layer = name.removesuffix(ending)
            for prefix in (_PEFT, "unet."):
                layer = layer.removeprefix(prefix)
            if layer.startswith("lora_unet_"):  # kohya's names have "_" where the layer has "."
                return flat.get(layer.removeprefix("lora_unet_"), layer), part
            return layer.replace(".processor.to_out", ".to_out.0").replace(".processor.", "."), part
    raise UserError(f"{file}: tensor {name!r} is not of a LoRA in the naming of diffusers, peft or kohya")


def _pair(
    module: Any, layer: str, parts: Mapping[str, torch.Tensor], about: Mapping[str, Any], where: str
) -> LoraPair:
    for part, other in (("down", "up"), ("up", "down")):
        if part not in parts:
            raise UserError(f"{where} has no counterpart ({other} without {part})")
    down, up, weight = parts["down"], parts["up"], module.weight
    if weight.ndim == 4 and down.ndim == 2:  # a 1x1 convolution, stored as a linear layer
        down, up = down[..., None, None], up[..., None, None]
    made = (up.shape[0], *down.shape[1:])
    if made != tuple(weight.shape) or tuple(up.shape[1:]) != (len(down), *[1] * (weight.ndim - 2)):
        shapes = f"down {tuple(down.shape)}, up {tuple(up.shape)}"
        raise UserError(f"{where} does not fit: {shapes} for a weight of {tuple(weight.shape)} in this UNet")
    return LoraPair(down.float(), up.float(), _alpha(layer, len(down), parts, about))


def _alpha(layer: str, rank: int, parts: Mapping[str, torch.Tensor], about: Mapping[str, Any]) -> float:
    """From the file's tensor, or its metadata; rank where it has neither, as diffusers and kohya take it."""
    if "alpha" in parts:
        return float(parts["alpha"])
    patterns = about.get("unet.alpha_pattern") or {}
    alpha = next((a for key, a in patterns.items() if layer == key or layer.endswith(f".{key}")), None)
    alpha = about.get("unet.lora_alpha") if alpha is None else alpha
    if alpha is None:
        return float(rank)
    return float(alpha) * (
        rank**0.5 if about.get("unet.use_rslora") else 1
    )  # its scale is alpha / sqrt(rank)


def _of_peft(file: Path) -> dict[str, Any]:
    """peft keeps alpha in a file of its own, beside the weights."""
    config = read_json_object(file.with_name("adapter_config.json"))
    if config.get("use_dora"):
        raise UserError(
            f"{file.with_name('adapter_config.json')}: use_dora is set; only a plain LoRA can be used"
        )
    return {
        f"unet.{key}": config[key] for key in ("lora_alpha", "alpha_pattern", "use_rslora") if key in config
    }
