"""The fused operation: the native library equals the reference bit for bit, and torch knows all about it."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ubgen.ops import guided_step, native_status, reference

A, B, GUIDANCE = 1.1189641, -0.11945176, 2.0
ADAMS_BASHFORTH = [[1.0], [3 / 2, -1 / 2], [23 / 12, -16 / 12, 5 / 12], [55 / 24, -59 / 24, 37 / 24, -9 / 24]]


def inputs(shape, depth, *, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, uncond, cond, *history = (
        torch.randn(shape, generator=generator, dtype=dtype) for _ in range(3 + depth)
    )
    return x, uncond, cond, history, A, B, GUIDANCE, ADAMS_BASHFORTH[depth]


def assert_same_bits(got, wanted):
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def needs_native():
    available, reason = native_status()
    if not available:
        pytest.skip(reason)


@pytest.mark.parametrize("depth", [0, 1, 2, 3])
def test_follows_the_formula(depth):
    x, uncond, cond, history, a, b, guidance, weights = inputs((2, 4, 8, 8), depth)
    x_next, e = guided_step(x, uncond, cond, history, a, b, guidance, weights)
    wanted_e = uncond.double() + guidance * (cond.double() - uncond.double())
    combined = sum(w * o.double() for w, o in zip(weights, [wanted_e, *history], strict=True))
    torch.testing.assert_close(e.double(), wanted_e, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(x_next.double(), a * x.double() + b * combined, rtol=1e-6, atol=2e-6)


@given(
    shape=st.lists(st.integers(0, 37), min_size=0, max_size=4),
    depth=st.integers(0, 3),
    guidance=st.floats(-10, 10),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=150, deadline=None)
def test_native_equals_the_reference_bit_for_bit_in_every_shape(shape, depth, guidance, seed):
    needs_native()
    x, uncond, cond, history, a, b, _, weights = inputs(shape, depth, seed=seed)
    arguments = (x, uncond, cond, history, a, b, guidance, weights)
    assert_same_bits(guided_step(*arguments), reference.guided_step(*arguments))


@pytest.mark.parametrize("size", [16383, 16384, 16385, 3 * 16384 + 5, 200_001])
@pytest.mark.parametrize("threads", [1, 2])
def test_every_block_boundary_on_every_thread_count(size, threads):
    needs_native()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        arguments = inputs((size,), 3)
        assert_same_bits(guided_step(*arguments), reference.guided_step(*arguments))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t[:, ::2],
        lambda t: t.transpose(0, 3),
        lambda t: t.contiguous(memory_format=torch.channels_last),
        lambda t: t[1:, :, 1:, 1:],
        lambda t: t[:1].expand(5, -1, -1, -1),
    ],
    ids=["every other", "transposed", "channels last", "offset", "expanded"],
)
def test_strided_inputs(view):
    x, uncond, cond, history, *rest = inputs((3, 4, 6, 7), 2)
    arguments = (view(x), view(uncond), view(cond), [view(h) for h in history], *rest)
    got = guided_step(*arguments)
    assert_same_bits(got, reference.guided_step(*arguments))
    assert all(tensor.is_contiguous() for tensor in got)


def test_nan_and_infinity_stay_where_they_are():
    arguments = inputs((40,), 1)
    arguments[1][3] = float("nan")
    arguments[3][0][7] = float("inf")
    x_next, e = guided_step(*arguments)
    assert_same_bits((x_next, e), reference.guided_step(*arguments))
    assert torch.isnan(x_next).nonzero().tolist() == [[3]]
    assert torch.isinf(x_next).nonzero().tolist() == [[7]]


def test_inputs_are_left_alone():
    arguments = inputs((2, 4, 8, 8), 3)
    copies = [t.clone() for t in (*arguments[:3], *arguments[3])]
    guided_step(*arguments)
    assert_same_bits([*arguments[:3], *arguments[3]], copies)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_dtypes_run_on_the_reference(dtype):
    arguments = inputs((2, 4, 4, 4), 2, dtype=dtype)
    got = guided_step(*arguments)
    assert all(tensor.dtype == dtype for tensor in got)
    assert_same_bits(got, reference.guided_step(*arguments))


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_opcheck(depth):
    x, uncond, cond, history, *rest = inputs((2, 3, 5), depth)
    for tensor in (x, uncond, cond, *history):
        tensor.requires_grad_()
    torch.library.opcheck(torch.ops.ubgen.guided_step.default, (x, uncond, cond, history, *rest))


@pytest.mark.parametrize("depth", [0, 2])
def test_gradient_equals_finite_differences(depth):
    x, uncond, cond, history, *rest = inputs((3, 4), depth, dtype=torch.float64)
    tensors = [t.requires_grad_() for t in (x, uncond, cond, *history)]

    def step(x, uncond, cond, *history):
        return guided_step(x, uncond, cond, list(history), *rest)

    assert torch.autograd.gradcheck(step, tensors)


def test_compiles_without_a_graph_break():
    arguments = inputs((2, 4, 8, 8), 3)
    compiled = torch.compile(guided_step, fullgraph=True, backend="aot_eager")
    assert_same_bits(compiled(*arguments), guided_step(*arguments))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({1: torch.zeros(2, 3)}, "all tensors must be like x"),
        ({2: torch.zeros(2, 4, dtype=torch.float64)}, "all tensors must be like x"),
        ({3: []}, "need 1 weights, not 2"),
        ({3: [torch.zeros(2, 4)] * 4, 7: [1.0] * 5}, "at most 3"),
    ],
)
def test_refuses_what_does_not_fit(change, message):
    arguments = list(inputs((2, 4), 1))
    for index, value in change.items():
        arguments[index] = value
    with pytest.raises(ValueError, match=message):
        guided_step(*arguments)


def test_without_the_library_the_reference_runs():
    program = (
        "import torch; from ubgen.ops import guided_step, native_status\n"
        "print(native_status())\n"
        "print(guided_step(*[torch.ones(3)] * 3, [], 1.0, 2.0, 2.0, [1.0])[0].tolist())"
    )
    environment = {**os.environ, "UBGEN_DISABLE_NATIVE": "1"}
    answer = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert answer.stdout.splitlines() == [
        "(False, 'switched off by UBGEN_DISABLE_NATIVE')",
        "[3.0, 3.0, 3.0]",
    ]
