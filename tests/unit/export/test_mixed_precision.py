"""Mixed precision: the kept modules are really float32, all else is really low, and the search finds what must stay."""

from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from ubgen.core.errors import UserError
from ubgen.export.exportable import Exportable
from ubgen.export.mixed_precision import layers_to_keep, lower, record_calls, smallest
from ubgen.export.spec import BatchRange, NetworkSpec

SPEC = NetworkSpec(BatchRange(1, 2, 4), tolerance=2e-2, precision="float16")


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


class Block(nn.Module):
    """x + down(silu(norm(up(x)))): the norm hides how large `up` makes its values."""

    def __init__(self, width: int, gain: float) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(width, width), nn.LayerNorm(width), nn.Linear(width, width)
        with torch.no_grad():
            self.up.weight.mul_(gain)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.silu(self.norm(self.up(x))))


class Network(nn.Module):
    def __init__(self, loud: Sequence[int], blocks: int = 8) -> None:
        super().__init__()
        self.stem = nn.Linear(16, 16)
        self.blocks = nn.ModuleList([Block(16, 1e5 if i in loud else 1.0) for i in range(blocks)])
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x).float()


def exportable(network: nn.Module) -> tuple[Exportable, list[Tensor]]:
    result = Exportable(network.eval(), [{"x": torch.randn(6, 16)}, {"x": 3 * torch.randn(5, 16)}], "y")
    return result, [result.reference(inputs) for inputs in result.inputs]


@pytest.mark.parametrize("needed", [{0}, {7}, {2, 3}, {1, 6}, {0, 4, 9}, set(range(10))])
def test_the_smallest_part_that_passes(needed: set[int]) -> None:
    tried: list[int] = []

    def passes(part: Sequence[str]) -> bool:
        tried.append(len(part))
        return needed <= {int(name) for name in part}

    assert {int(name) for name in smallest([str(i) for i in range(10)], passes)} == needed
    assert len(tried) <= 30


@pytest.mark.parametrize("loud", [[5], [1, 6]])
def test_the_layers_inside_the_blocks_are_found(loud: list[int]) -> None:
    """`up` overflows, and `norm` must take its float32 result."""
    network, expected = exportable(Network(loud))
    said: list[str] = []
    kept = layers_to_keep(network, expected, SPEC, "cpu", said.append)
    assert kept == tuple(f"blocks.{i}.{part}" for i in loud for part in ("up", "norm"))
    assert said
    mended = lower(network.module, "float16", kept, record_calls(network.module, network.inputs[0]))
    with torch.no_grad():
        assert torch.allclose(
            mended(network.inputs[1]["x"]), expected[1], atol=2e-2 * float(expected[1].abs().max())
        )


def test_what_low_precision_does_not_cause_is_not_blamed_on_it() -> None:
    network, expected = exportable(Network([]))
    assert layers_to_keep(network, expected, SPEC, "cpu", print) == ()
    wrong = [wanted + 1 for wanted in expected]
    assert layers_to_keep(network, wrong, SPEC, "cpu", print) == ()


class Scarce(Network):
    """Runs out of memory when a lowered copy has its end in float32, as on a GPU that holds no more of it."""

    def forward(self, x: Tensor) -> Tensor:
        if self.head._forward_pre_hooks_with_kwargs and self.head.weight.dtype == torch.float32:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return super().forward(x)


def test_too_little_memory_is_not_taken_for_layers_that_do_not_help() -> None:
    network, expected = exportable(Scarce([3]))
    with pytest.raises(torch.OutOfMemoryError):
        layers_to_keep(network, expected, SPEC, "cpu", print)
