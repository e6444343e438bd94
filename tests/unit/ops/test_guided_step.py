"""The fused operation: the native library has the reference's bits, and runs only where nothing would notice."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from ubgen.ops import guided_step, native_status
from ubgen.ops.step import guided_step_reference

A, B, GUIDANCE = 1.1189641, -0.11945176, 2.0
ADAMS_BASHFORTH = [[1.0], [3 / 2, -1 / 2], [23 / 12, -16 / 12, 5 / 12], [55 / 24, -59 / 24, 37 / 24, -9 / 24]]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


@pytest.fixture(scope="session")
def native():
    """Skips where the native library was not built: there is nothing to compare."""
    available, reason = native_status()
    if not available:
        pytest.skip(reason)


@pytest.fixture(params=[1, 2])
def threads(request):
    """The test on one and on two threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def inputs(shape, depth, *, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, uncond, cond, *history = (torch.randn(shape, generator=generator).to(dtype) for _ in range(3 + depth))
    return x, uncond, cond, history, A, B, GUIDANCE, ADAMS_BASHFORTH[depth]


def assert_same_bits(got, wanted):
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


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
    dtype=st.sampled_from(DTYPES),
    guidance=st.floats(-10, 10),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=100, deadline=None)
def test_native_equals_the_reference_bit_for_bit_in_every_shape(native, shape, depth, dtype, guidance, seed):
    x, uncond, cond, history, a, b, _, weights = inputs(shape, depth, dtype=dtype, seed=seed)
    arguments = (x, uncond, cond, history, a, b, guidance, weights)
    assert_same_bits(guided_step(*arguments), guided_step_reference(*arguments))


@pytest.mark.parametrize("size", [32767, 32768, 200_001])
def test_every_thread_count(native, threads, size):
    arguments = inputs((size,), 3)
    assert_same_bits(guided_step(*arguments), guided_step_reference(*arguments))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(dtype):
    arguments = inputs((2, 4, 8, 8), 3, dtype=dtype)
    x, uncond, cond, history, *rest = arguments
    wide = guided_step(x.double(), uncond.double(), cond.double(), [h.double() for h in history], *rest)
    for got, wanted in zip(guided_step(*arguments), wide, strict=True):
        assert got.dtype == dtype
        spacing = torch.finfo(dtype).eps * wanted.abs()
        assert ((got.double() - wanted).abs() <= 0.5 * spacing + 2e-6).all()


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
    assert_same_bits(got, guided_step_reference(*arguments))
    assert all(tensor.is_contiguous() for tensor in got)


def test_nan_and_infinity_stay_where_they_are():
    arguments = inputs((40,), 1)
    arguments[1][3] = float("nan")
    arguments[3][0][7] = float("inf")
    x_next, e = guided_step(*arguments)
    assert_same_bits((x_next, e), guided_step_reference(*arguments))
    assert torch.isnan(x_next).nonzero().tolist() == [[3]]
    assert torch.isinf(x_next).nonzero().tolist() == [[7]]


def test_inputs_are_left_alone():
    arguments = inputs((2, 4, 8, 8), 3)
    copies = [t.clone() for t in (*arguments[:3], *arguments[3])]
    guided_step(*arguments)
    assert_same_bits([*arguments[:3], *arguments[3]], copies)


def test_gradient_equals_finite_differences():
    x, uncond, cond, history, *rest = inputs((3, 4), 2, dtype=torch.float64)
    tensors = [t.requires_grad_() for t in (x, uncond, cond, *history)]
    assert torch.autograd.gradcheck(lambda x, u, c, *h: guided_step(x, u, c, list(h), *rest), tensors)


def test_gradient_flows_in_float32():
    x, *rest = inputs((2, 4, 8, 8), 1)
    x_next, e = guided_step(x.requires_grad_(), *rest)
    (x_next.sum() + e.sum()).backward()
    torch.testing.assert_close(x.grad, torch.full_like(x, A))


def test_a_trace_sees_the_arithmetic():
    x, uncond, cond, history, *rest = inputs((2, 4, 8, 8), 1)
    graph = make_fx(lambda x, u, c, h: guided_step(x, u, c, [h], *rest))(x, uncond, cond, history[0])
    other = torch.randn_like(x)
    assert_same_bits(graph(other, uncond, cond, *history), guided_step(other, uncond, cond, history, *rest))


def test_fake_tensors_have_the_shapes_of_real_ones():
    x, uncond, cond, history, *rest = inputs((2, 4, 8, 8), 1)
    with FakeTensorMode() as mode:
        tensors = [mode.from_tensor(t) for t in (x, uncond, cond, *history)]
        fake = guided_step(*tensors[:3], tensors[3:], *rest)
    assert {(value.shape, value.dtype, value.stride()) for value in fake} == {(x.shape, x.dtype, x.stride())}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_a_transform_sees_the_arithmetic():
    """Past the dispatcher, the operation would see a wrapper without memory of its own."""
    x, uncond, cond, _, *rest = inputs((5, 4), 0)
    each = torch.vmap(lambda x, u, c: guided_step(x, u, c, [], *rest))(x, uncond, cond)
    assert_same_bits(each, guided_step(x, uncond, cond, [], *rest))


def test_compiles_without_a_graph_break():
    arguments = inputs((2, 4, 8, 8), 3)
    compiled = torch.compile(guided_step, fullgraph=True, backend="aot_eager")
    assert_same_bits(compiled(*arguments), guided_step(*arguments))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({1: torch.zeros(2, 3)}, "all tensors must be like x"),
        ({3: [torch.zeros(4)]}, "all tensors must be like x"),
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
        "import torch; from ubgen.ops import *; x = torch.ones(3)\n"
        "print(native_status(), guided_step(x, x, x, [], 1.0, 1.0, 2.0, [1.0])[0].tolist())"
    )
    answer = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "UBGEN_DISABLE_NATIVE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert answer.stdout.strip() == "(False, 'switched off by UBGEN_DISABLE_NATIVE') [2.0, 2.0, 2.0]"
