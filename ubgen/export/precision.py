"""A network in low precision, with named modules left in float32."""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ubgen.core.errors import UserError
from ubgen.export.spec import Precision

DTYPES: dict[Precision, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float8": torch.float16,  # the compiler quantises a float16 graph
}
_FLOAT8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Calls:
    """The modules of a network that a forward pass calls: `leaves` (those with weights of their own) in order."""

    leaves: list[str]
    names: list[str]


@torch.no_grad()
def record_calls(module: nn.Module, inputs: Mapping[str, Tensor]) -> Calls:
    """Run `module(**inputs)` once and note who was called, in the order of first entry."""
    leaves, names, handles = list[str](), list[str](), []
    for name, part in module.named_modules():
        if next(part.parameters(), None) is None:
            continue
        targets = [names, leaves] if _owns_weights(part) else [names]
        handles.append(part.register_forward_pre_hook(_note(name, targets)))
    try:
        module(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return Calls(list(dict.fromkeys(leaves)), list(dict.fromkeys(names)))


def _note(name: str, targets: Sequence[list[str]]) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any) -> None:
        for target in targets:
            target.append(name)

    return hook


def lower(
    module: nn.Module,
    precision: Precision,
    keep_float32: Iterable[str] = (),
    calls: Calls | None = None,
    device: str = "cpu",
    *,
    emulate_float8: bool = False,
) -> nn.Module:
    """A copy of the float32 `module` on `device` in `precision`; the modules named in `keep_float32` stay float32.

    Inputs are cast at the border of each module with weights, and what a kept module returns is cast down again
    unless the next module called is kept too (`calls` of the float32 module tells): values that only float32
    can hold may pass between the two. float8 gives float16, and with `emulate_float8` also float16 values rounded to
    float8 in every matrix product and convolution, as the compiler will do it. The copy shares what it need not change.

    UserError when a name is not a module with weights.
    """
    low, kept = DTYPES[precision], tuple(dict.fromkeys(keep_float32))
    _check_names(module, kept)
    quantise = emulate_float8 and precision == "float8"
    memo: dict[int, Any] = {}
    for prefix, part in module.named_modules():
        dtype = torch.float32 if _inside(prefix, kept) else low
        for name, tensor in [*part._parameters.items(), *part._buffers.items()]:
            if tensor is None:
                continue
            placed = tensor.detach().to(device, dtype if tensor.is_floating_point() else tensor.dtype)
            if quantise and name == "weight" and _multiplies(part) and dtype == low:
                placed = _round_to_float8(placed, keep_dim=0)
            is_parameter = isinstance(tensor, nn.Parameter)
            memo[id(tensor)] = nn.Parameter(placed, requires_grad=False) if is_parameter else placed
    lowered = copy.deepcopy(module, memo)
    if precision != "float32":
        _add_casts(lowered, low, kept, calls, quantise)
    return lowered


def _check_names(module: nn.Module, kept: Sequence[str]) -> None:
    known = dict(module.named_modules())
    for name in kept:
        if name not in known or next(known[name].parameters(), None) is None:
            near = ", ".join(n for n in known if n and n.count(".") <= 1)
            raise UserError(f"keep_float32: the network has no module {name!r} with weights; it has {near}")


def _add_casts(
    module: nn.Module, low: torch.dtype, kept: Sequence[str], calls: Calls | None, quantise: bool
) -> None:
    for name, part in module.named_modules():
        inside = _inside(name, kept)
        if _owns_weights(part) or name in kept:
            rounded = quantise and not inside and _multiplies(part)
            part.register_forward_pre_hook(
                _cast_inputs(torch.float32 if inside else low, rounded), with_kwargs=True
            )
        if name in kept and not (calls and _next_is_kept(name, kept, calls.leaves)):
            part.register_forward_hook(_cast_outputs(low))


def _owns_weights(module: nn.Module) -> bool:
    return any(parameter is not None for parameter in module._parameters.values())


def _multiplies(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | nn.Conv2d)


def _inside(name: str, kept: Iterable[str]) -> bool:
    return any(name == k or name.startswith(f"{k}.") for k in kept)


def _next_is_kept(name: str, kept: Sequence[str], leaves: Sequence[str]) -> bool:
    own = [i for i, leaf in enumerate(leaves) if _inside(leaf, (name,))]
    return bool(own) and own[-1] + 1 < len(leaves) and _inside(leaves[own[-1] + 1], kept)


def _cast(value: Any, dtype: torch.dtype, rounded: bool = False) -> Any:
    def one(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            return leaf
        leaf = leaf.to(dtype)
        return _round_to_float8(leaf) if rounded else leaf

    return pytree.tree_map(one, value)


def _cast_inputs(dtype: torch.dtype, rounded: bool) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
        return _cast(args, dtype, rounded), _cast(kwargs, dtype, rounded)

    return hook


def _cast_outputs(dtype: torch.dtype) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        return _cast(output, dtype)

    return hook


def _round_to_float8(x: Tensor, keep_dim: int | None = None) -> Tensor:
    """To the nearest of 448 / max|x| scaled float8 values; one scale for each index of `keep_dim`, or a single one."""
    dims = [d for d in range(x.ndim) if d != keep_dim]
    scale = (x.abs().amax(dims, keepdim=True).float() / 448).clamp(min=1e-12)
    return ((x.float() / scale).to(_FLOAT8).float() * scale).to(x.dtype)
