"""The fused operation: the native library equals the reference bit for bit, and torch knows all about it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ubgen.ops import guided_step, reference

A, B, GUIDANCE, S = 1.1189641, -0.11945176, 2.0, 0.37
ADAMS_BASHFORTH = [[1.0], [3 / 2, -1 / 2], [23 / 12, -16 / 12, 5 / 12], [55 / 24, -59 / 24, 37 / 24, -9 / 24]]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def inputs(shape, depth, *, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, uncond, cond, *history = (torch.randn(shape, generator=generator).to(dtype) for _ in range(3 + depth))
    return x, uncond, cond, history, A, B, GUIDANCE, ADAMS_BASHFORTH[depth]


def operands(shape, depth, *, guided=True, noisy=True):
    """In the order of the operator itself."""
    x, uncond, cond, history, a, b, guidance, weights = inputs(shape, depth)
    noise = torch.randn(shape) if noisy else None
    return x, uncond, (cond if guided else None), history, noise, a, b, guidance, S, weights


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
    guided=st.booleans(),
    noisy=st.booleans(),
    guidance=st.floats(-10, 10),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=150, deadline=None)
def test_native_equals_the_reference_bit_for_bit_in_every_shape(
    native, shape, depth, dtype, guided, noisy, guidance, seed
):
    x, uncond, cond, history, a, b, _, weights = inputs(shape, depth, dtype=dtype, seed=seed)
    rest = (cond if guided else None, history, a, b, guidance, weights)
    noise = {"noise": torch.randn(shape).to(dtype), "s": S} if noisy else {}
    assert_same_bits(guided_step(x, uncond, *rest, **noise), reference.guided_step(x, uncond, *rest, **noise))


@pytest.mark.parametrize("size", [16383, 16384, 16385, 3 * 16384 + 5, 200_001])
def test_every_block_boundary_on_every_thread_count(native, threads, size):
    arguments = inputs((size,), 3)
    assert_same_bits(guided_step(*arguments), reference.guided_step(*arguments))


def test_a_network_with_guidance_inside_gets_its_output_back():
    x, e, _, history, a, b, _, weights = inputs((2, 4, 8, 8), 2)
    x_next, same = guided_step(x, e, None, history, a, b, 7.5, weights)
    assert same is e
    wanted, _ = guided_step(x, e, e, history, a, b, 1.0, weights)  # e + 1 * (e - e) is e
    assert_same_bits([x_next], [wanted])


def test_the_noise_of_ddpm_has_its_own_coefficient():
    x, uncond, cond, *_ = inputs((2, 4, 8, 8), 0)
    noise = torch.randn(2, 4, 8, 8)
    quiet, e = guided_step(x, uncond, cond, [], A, B, GUIDANCE, [1.0])
    got = guided_step(x, uncond, cond, [], A, B, GUIDANCE, [1.0], noise=noise, s=S)
    assert_same_bits(got, (quiet + S * noise, e))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(dtype):
    arguments = inputs((2, 4, 8, 8), 3, dtype=dtype)
    x, uncond, cond, history, *rest = arguments
    wide = guided_step(x.double(), uncond.double(), cond.double(), [h.double() for h in history], *rest)
    for got, wanted in zip(guided_step(*arguments), wide, strict=True):
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


def test_float64_runs_on_the_reference():
    arguments = inputs((2, 4, 4, 4), 2, dtype=torch.float64)
    got = guided_step(*arguments)
    assert all(tensor.dtype == torch.float64 for tensor in got)
    assert_same_bits(got, reference.guided_step(*arguments))


@pytest.mark.parametrize(("depth", "guided", "noisy"), [(0, True, False), (1, True, True), (3, False, False)])
def test_opcheck(depth, guided, noisy):
    tensors = operands((2, 3, 5), depth, guided=guided, noisy=noisy)
    for tensor in (*tensors[:3], *tensors[3], tensors[4]):
        if tensor is not None:
            tensor.requires_grad_()
    torch.library.opcheck(torch.ops.ubgen.guided_step.default, tensors)


@pytest.mark.parametrize(("depth", "guided"), [(0, True), (2, True), (1, False)])
def test_gradient_equals_finite_differences(depth, guided):
    x, uncond, cond, history, *rest = inputs((3, 4), depth, dtype=torch.float64)
    noise = torch.randn(3, 4, dtype=torch.float64)
    tensors = [t.requires_grad_() for t in (x, uncond, cond, noise, *history)]

    def step(x, uncond, cond, noise, *history):
        x_next, e = guided_step(x, uncond, cond if guided else None, list(history), *rest, noise=noise, s=S)
        return x_next + (0 if guided else 0 * cond), e  # gradcheck wants every input used

    assert torch.autograd.gradcheck(step, tensors)


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
