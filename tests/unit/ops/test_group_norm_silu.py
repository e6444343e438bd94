"""GroupNorm and SiLU in one operation: against PyTorch's two in double precision, in both layouts."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from ubgen.ops import group_norm_silu, reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LAYOUTS = [torch.contiguous_format, torch.channels_last]


def inputs(shape, *, dtype=torch.float32, mean=0.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = mean + 2 * torch.randn(shape, generator=generator)
    weight, bias = (torch.randn(shape[1], generator=generator) for _ in range(2))
    return x.to(dtype), 1 + weight, bias


def in_double(x, groups, weight, bias, eps=1e-5):
    return F.silu(F.group_norm(x.double(), groups, weight.double(), bias.double(), eps))


def assert_close(got, wanted):
    """Half a unit in the last place of the result's type, and what float32 arithmetic loses."""
    rtol = torch.finfo(got.dtype).eps / 2 if got.dtype != torch.float32 else 1e-6
    torch.testing.assert_close(got.double(), wanted, rtol=rtol, atol=5e-6, equal_nan=True)


@given(
    batch=st.integers(0, 3),
    groups=st.integers(1, 5),
    members=st.integers(1, 9),
    height=st.integers(1, 12),
    width=st.integers(1, 12),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
    broken=st.booleans(),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=150, deadline=None)
def test_equals_two_operations_in_double(batch, groups, members, height, width, dtype, layout, broken, seed):
    x, weight, bias = inputs((batch, groups * members, height, width), dtype=dtype, seed=seed)
    if broken and x.numel():
        x[0, 0, 0, 0] = float("nan")
    x = x.contiguous(memory_format=layout)
    got = group_norm_silu(x, groups, weight, bias)
    assert (got.shape, got.dtype) == (x.shape, x.dtype)
    assert got.is_contiguous(memory_format=layout) or not got.numel()
    # a single value has no variance: a rounding error in the mean is all there is
    if height * width * members > 1:
        assert_close(got, in_double(x, groups, weight, bias))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [320, 640])
def test_the_sizes_of_a_unet(threads, layout, channels):
    x, weight, bias = inputs((2, channels, 16, 24))
    got = group_norm_silu(x.contiguous(memory_format=layout), 32, weight, bias, 1e-6)
    assert_close(got, in_double(x, 32, weight, bias, 1e-6))


@pytest.mark.parametrize("shape", [(2, 6), (2, 6, 5), (2, 6, 3, 4, 2)])
def test_any_number_of_dimensions(shape):
    x, weight, bias = inputs(shape)
    assert_close(group_norm_silu(x, 2, weight, bias), in_double(x, 2, weight, bias))


@pytest.mark.parametrize(
    "view",
    [lambda t: t[:, :, ::2, 1:], lambda t: t.transpose(2, 3), lambda t: t[:1].expand(3, -1, -1, -1)],
    ids=["cut", "transposed", "expanded"],
)
def test_strided_inputs(view):
    x, weight, bias = inputs((2, 8, 9, 10))
    got = group_norm_silu(view(x), 4, weight, bias)
    assert got.is_contiguous()
    assert_close(got, in_double(view(x), 4, weight, bias))


def test_a_large_mean_costs_no_more_than_float32_must_lose():
    x, weight, bias = inputs((1, 8, 32, 32), mean=1000.0)
    got, wanted = group_norm_silu(x, 2, weight, bias), in_double(x, 2, weight, bias)
    assert (got.double() - wanted).abs().max() < 1e-3
    eager = F.silu(F.group_norm(x, 2, weight, bias))
    assert (got.double() - wanted).abs().max() <= 2 * (eager.double() - wanted).abs().max()


def test_large_values_saturate():
    x, weight, bias = inputs((1, 4, 8, 8))
    got = group_norm_silu(x, 1, 1e4 * weight, bias)
    wanted = in_double(x, 1, 1e4 * weight, bias)
    torch.testing.assert_close(got.double(), wanted, rtol=2e-6, atol=2e-2)
    assert got.isfinite().all()


def test_half_precision_parameters():
    x, weight, bias = inputs((2, 8, 6, 6), dtype=torch.bfloat16)
    low = (weight.bfloat16(), bias.bfloat16())
    assert_close(group_norm_silu(x, 2, *low), in_double(x, 2, *low))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_equals_finite_differences(layout):
    x, weight, bias = (t.double().requires_grad_() for t in inputs((2, 6, 3, 2)))
    x = x.detach().contiguous(memory_format=layout).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w, b: group_norm_silu(x, 3, w, b), (x, weight, bias))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_equals_that_of_two_operations(dtype):
    tensors = [t.requires_grad_() for t in inputs((2, 8, 5, 4), dtype=dtype)]
    grad = torch.randn(2, 8, 5, 4).to(dtype)
    got = torch.autograd.grad(group_norm_silu(tensors[0], 2, *tensors[1:]), tensors, grad)
    wanted = torch.autograd.grad(reference.group_norm_silu(tensors[0], 2, *tensors[1:]), tensors, grad)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=2 * torch.finfo(dtype).eps, atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_opcheck(dtype, layout):
    x, weight, bias = inputs((2, 6, 5, 4), dtype=dtype)
    x = x.contiguous(memory_format=layout)
    tensors = (x.requires_grad_(), 3, weight.requires_grad_(), bias.requires_grad_(), 1e-5)
    torch.library.opcheck(torch.ops.ubgen.group_norm_silu.default, tensors, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "groups", "parameters", "message"),
    [
        ((2, 6, 4), 4, 6, "4 groups do not fit"),
        ((2, 6, 4), 0, 6, "0 groups do not fit"),
        ((6,), 2, 6, "2 groups do not fit"),
        ((2, 6, 4), 2, 5, r"must be \(6,\)"),
    ],
)
def test_refuses_what_does_not_fit(shape, groups, parameters, message):
    ones = torch.ones(parameters)
    with pytest.raises(ValueError, match=message):
        group_norm_silu(torch.zeros(shape), groups, ones, ones)
