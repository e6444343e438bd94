"""Low precision with islands of float32: the islands are really float32, everything else is really low."""

from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from ubgen.core.errors import UserError
from ubgen.export.precision import lower, record_calls


class Residual(nn.Module):
    """x + down(silu(up(x))); `scale` makes the inside large and leaves the result alone."""

    def __init__(self, width: int, scale: float = 1.0) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        with torch.no_grad():
            for parameter in self.up.parameters():
                parameter.mul_(scale)
            self.down.weight.div_(scale)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.silu(self.up(x)))


class Stack(nn.Module):
    """Blocks around a stream; the one at `loud` works on values beyond float16's 65504."""

    def __init__(self, blocks: int = 5, loud: int | None = None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Residual(8, 1e5 if i == loud else 1.0) for i in range(blocks)])
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.norm(x).float()


class Handover(nn.Module):
    """`first` returns what only float32 holds, and `second` makes it small again."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8), nn.LayerNorm(8)
        self.after = nn.Linear(8, 8)
        with torch.no_grad():
            self.first.weight.mul_(1.5e5)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.second(self.first(self.before(x)))).float()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def dtypes_seen(module: nn.Module, x: Tensor) -> dict[str, torch.dtype]:
    """What each module with weights is given."""
    seen: dict[str, torch.dtype] = {}
    for name, part in module.named_modules():
        if isinstance(part, nn.Linear | nn.LayerNorm):
            # registered after the casts, so that it sees their result
            part.register_forward_pre_hook(lambda m, args, name=name: seen.update({name: args[0].dtype}))
    module(x=x)
    return seen


def test_weights_and_what_they_meet_are_low_outside_the_islands() -> None:
    stack, x = Stack(), torch.randn(3, 8)
    lowered = lower(stack, "bfloat16", ["blocks.2"], record_calls(stack, {"x": x}))
    kept = {name for name, p in lowered.named_parameters() if p.dtype == torch.float32}
    assert kept == {f"blocks.2.{part}" for part in ("up.weight", "up.bias", "down.weight", "down.bias")}
    seen = dtypes_seen(lowered, x)
    assert Counter(seen.values()) == {torch.bfloat16: 9, torch.float32: 2}
    assert seen["blocks.2.up"] == torch.float32
    assert seen["blocks.3.up"] == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in stack.parameters())


def test_the_island_saves_a_block_that_overflows() -> None:
    stack, x = Stack(loud=3), torch.randn(16, 8)
    with torch.no_grad():
        wanted = stack(x)
        assert not lower(stack, "float16")(x).isfinite().all()
        assert not lower(stack, "float16", ["blocks.2"])(x).isfinite().all()
        assert (lower(stack, "float16", ["blocks.3"])(x) - wanted).abs().max() < 1e-2


def test_two_islands_in_a_row_hand_over_in_float32() -> None:
    network, x = Handover(), torch.randn(4, 8)
    calls = record_calls(network, {"x": x})
    with torch.no_grad():
        wanted = network(x)
        assert not lower(network, "float16", ["first"], calls)(x).isfinite().all()
        lowered = lower(network, "float16", ["first", "second"], calls)
        assert (lowered(x) - wanted).abs().max() < 1e-2
    assert dtypes_seen(lowered, x)["after"] == torch.float16


def test_the_copy_shares_what_stays_float32() -> None:
    stack = Stack()
    pointers = {p.data_ptr() for p in stack.parameters()}
    assert {p.data_ptr() for p in lower(stack, "float32").parameters()} == pointers
    lowered = lower(stack, "float16", ["blocks.0"])
    assert sum(p.data_ptr() in pointers for p in lowered.parameters()) == 4


def test_float8_is_emulated_only_where_it_multiplies() -> None:
    stack, x = Stack(2), torch.randn(64, 8)
    with torch.no_grad():
        wanted = stack(x)
        half, eight = lower(stack, "float8"), lower(stack, "float8", emulate_float8=True)
        kept = lower(stack, "float8", ["blocks.0", "blocks.1"], emulate_float8=True)
        errors = [float((network(x) - wanted).abs().max()) for network in (kept, half, eight)]
    assert errors[0] < errors[1] < 0.05 * errors[2]
    assert errors[2] < 0.5


def test_calls_come_in_order() -> None:
    calls = record_calls(Stack(2), {"x": torch.randn(2, 8)})
    assert calls.leaves == ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down", "norm"]
    assert calls.names == ["", "blocks.0", *calls.leaves[:2], "blocks.1", *calls.leaves[2:]]


def test_an_unknown_module_is_named() -> None:
    with pytest.raises(UserError, match=r"no module 'blocks\.9' with weights; it has blocks, "):
        lower(Stack(2), "float16", ["blocks.9"])
