"""Mixed precision: a network in low precision with some modules in float32, and the search for those modules."""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ubgen.core.errors import UserError
from ubgen.diffusion import sample_guided
from ubgen.export.exportable import Exportable, Say
from ubgen.export.inputs import CHUNK, RealInputs, outputs
from ubgen.export.parity import row_errors
from ubgen.export.spec import EngineSpec, NetworkSpec, Precision

DTYPES: dict[Precision, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float8": torch.float16,  # the compiler quantises a float16 graph
}
_FLOAT8 = torch.float8_e4m3fn
_MARGIN = 0.5  # of the tolerance: the engine rounds elsewhere than PyTorch does
_WORST_ROWS = 4  # of all real inputs, for the search; the engine is then compared on all of them
_DEPTH = 4  # how often blocks are opened: in a UNet network, block, sub-block, layer


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


@torch.no_grad()
def lowered_pixels(
    networks: Mapping[str, Exportable],
    kept: Mapping[str, Sequence[str]],
    real: RealInputs,
    spec: EngineSpec,
    scheduler: Any,
) -> Tensor | None:
    """(N,H,W,3) what PyTorch makes of `real.noise` in the spec's precisions, but for the modules `kept` in float32.

    None where the three networks that make an image are in float32.
    """
    specs = {name: getattr(spec.networks, name) for name in ("text_encoder", "unet", "vae_decoder")}
    if all(wanted.precision == "float32" for wanted in specs.values()):
        return None
    low = dict[str, nn.Module]()
    for name, wanted in specs.items():
        module = networks[name].module
        calls = record_calls(module, networks[name].example(wanted.batch))
        low[name] = lower(module, wanted.precision, kept[name], calls, spec.device, emulate_float8=True)
    embeddings = low["text_encoder"](input_ids=real.input_ids.to(spec.device))
    shared = {"uncond": embeddings[-1:], "guidance": embeddings.new_tensor([spec.parity.guidance])}
    pixels = list[Tensor]()
    for noise, cond in zip(real.noise.split(CHUNK), embeddings[:-1].split(CHUNK), strict=True):

        def predict(latents: Tensor, timestep: Tensor, cond: Tensor = cond) -> Tensor:
            return low["unet"](latents=latents, timestep=timestep, cond=cond, **shared)

        latents = sample_guided(predict, scheduler, noise.to(spec.device), steps=spec.parity.steps)
        pixels.append(low["vae_decoder"](latents=latents).cpu())
    return torch.cat(pixels)


def layers_to_keep(
    network: Exportable, expected: Sequence[Tensor], spec: NetworkSpec, device: str, say: Say
) -> tuple[str, ...]:
    """Modules to keep in float32 so that `network` (float32, on the CPU) meets its tolerance; empty if none helps.

    Delta debugging over the blocks that the network calls: starting from all of them, halves, quarters and at last
    single blocks are left out while the rest still suffices. Then each that remains is opened, and the same is done
    with the blocks inside.
    """
    search = _Search.of(network, expected, spec, device)
    kept = _blocks(search.calls, "")
    # when low precision alone is good enough it is not what went wrong; when float32 everywhere is not, neither
    if search.passes(()) or not search.passes(kept):
        return ()
    kept = smallest(kept, search.passes)
    for _ in range(_DEPTH):
        say(f"layers that need float32: looking into {', '.join(kept)}")
        finer = _open(kept, search)
        if finer == kept:
            break
        kept = finer
    return tuple(kept)


def smallest(blocks: Sequence[str], passes: Callable[[Sequence[str]], bool]) -> list[str]:
    """A part of `blocks` that still passes, and from which no single one can be left out; `blocks` itself passes."""
    kept, size = list(blocks), max(1, len(blocks) // 2)
    while size:
        start, shrunk = 0, False
        while start < len(kept):
            fewer = kept[:start] + kept[start + size :]
            if fewer and passes(fewer):
                kept, shrunk = fewer, True
            else:
                start += size
        size = size if shrunk and size == 1 else size // 2
    return kept


def _open(kept: Sequence[str], search: "_Search") -> list[str]:
    """Replace each block by the blocks inside it that are needed, where they suffice."""
    current = list(kept)
    for block in kept:
        inner = _blocks(search.calls, block)
        others = [other for other in current if other != block]
        if inner and search.passes([*others, *inner]):
            needed = smallest(inner, lambda part, others=others: search.passes([*others, *part]))  # type: ignore[misc]
            current = search.in_order([*others, *needed])
    return current


def _blocks(calls: Calls, path: str) -> list[str]:
    """The called modules right below `path`, in order; containers that are not called themselves don't count."""
    inside = [
        name for name in calls.names if name and name != path and (not path or name.startswith(f"{path}."))
    ]
    return [name for name in inside if not any(name.startswith(f"{other}.") for other in inside)]


@dataclass(frozen=True)
class _Search:
    network: Exportable
    expected: Tensor
    largest: float
    spec: NetworkSpec
    calls: Calls
    device: str

    @staticmethod
    def of(network: Exportable, expected: Sequence[Tensor], spec: NetworkSpec, device: str) -> "_Search":
        """On the worst rows of all real inputs."""
        calls = record_calls(network.module, network.example(spec.batch))
        largest = max(float(wanted.double().abs().max()) for wanted in expected)
        whole = _Search(network, torch.empty(0), largest, spec, calls, device)
        ours = whole.lowered_outputs(())
        errors = [row_errors(o, e, largest) for o, e in zip(ours, expected, strict=True)]
        ranked = sorted(
            ((float(error), i, row) for i, rows in enumerate(errors) for row, error in enumerate(rows)),
            reverse=True,
        )[:_WORST_ROWS]
        inputs = [network.rows(network.inputs[i], row, row + 1) for _, i, row in ranked]
        wanted = torch.cat([expected[i][row : row + 1] for _, i, row in ranked])
        return replace(whole, network=replace(network, inputs=inputs), expected=wanted)

    def lowered_outputs(self, kept: Sequence[str]) -> list[Tensor]:
        names = self.in_order([*self.spec.keep_float32, *kept])
        module = lower(
            self.network.module,
            self.spec.precision,
            names,
            self.calls,
            self.device,
            emulate_float8=True,
        )
        return outputs(replace(self.network, module=module), self.device)

    def passes(self, kept: Sequence[str]) -> bool:
        try:
            ours = torch.cat(self.lowered_outputs(kept))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # float32 and low precision meet in an operation that takes no two types
            return False
        errors = row_errors(ours, self.expected, self.largest)
        return bool(errors.max() <= self.spec.tolerance * _MARGIN)

    def in_order(self, names: Sequence[str]) -> list[str]:
        place = {name: i for i, name in enumerate(self.calls.names)}
        return sorted(dict.fromkeys(names), key=lambda name: place.get(name, -1))
