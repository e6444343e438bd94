"""Decoder output to bytes: the native library equals the reference bit for bit."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ubgen.ops import quantise, reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SPECIAL = [float("nan"), float("inf"), -float("inf"), -0.0, 1e-40, 65504.0, -65504.0]


def images(shape, *, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (0.5 + 0.4 * torch.randn(shape, generator=generator)).to(dtype)


def assert_same_bits(got, wanted):
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@given(
    batch=st.integers(0, 3),
    height=st.integers(0, 33),
    width=st.integers(0, 40),
    dtype=st.sampled_from(DTYPES),
    channels_last=st.booleans(),
    special=st.lists(st.tuples(st.integers(0, 10**6), st.sampled_from(SPECIAL)), max_size=6),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=150, deadline=None)
def test_native_equals_the_reference(native, batch, height, width, dtype, channels_last, special, seed):
    x = images((batch, 3, height, width), dtype=dtype, seed=seed)
    for place, value in special if x.numel() else []:
        x.view(-1)[place % x.numel()] = value
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    assert_same_bits(quantise(x), reference.quantise(x))


def test_strips_and_threads(native, threads):
    x = images((2, 3, 300, 171))
    x[1, 2, 299, 170] = float("nan")
    assert_same_bits(quantise(x), reference.quantise(x))


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t[:, :, ::2, 1:],
        lambda t: t.transpose(2, 3),
        lambda t: t[:, [2, 1, 0]],
        lambda t: t[:1].expand(4, -1, -1, -1),
        lambda t: t.contiguous(memory_format=torch.channels_last)[1:],
    ],
    ids=["cut", "transposed", "swapped", "expanded", "part of channels last"],
)
def test_strided_inputs(view):
    x = view(images((3, 3, 12, 10)))
    assert_same_bits(quantise(x), reference.quantise(x))


def test_bytes_are_those_of_numpy():
    x = torch.rand(1, 3, 20, 20)
    wanted = np.rint(x.double().numpy()[0].transpose(1, 2, 0) * 255).astype(np.uint8)
    assert np.array_equal(quantise(x).pixels_BHW3[0].numpy(), wanted)


def test_halves_round_to_even_and_the_ends_are_clamped():
    values = torch.tensor([0.0, 1.0, -3.0, 7.0, float("inf"), -float("inf"), float("nan")])
    got = quantise(values.view(1, 1, 1, 7).expand(1, 3, 1, 7)).pixels_BHW3[0, 0, :, 0]
    assert got.tolist() == [0, 255, 0, 255, 255, 0, 0]
    ties = (torch.arange(0, 255) + 0.5) / 255
    ties = ties[(ties * 255) % 1 == 0.5]  # those that float32 hits exactly
    got = quantise(ties.view(1, 1, 1, -1).expand(1, 3, 1, -1)).pixels_BHW3
    assert len(ties) > 100
    assert (got % 2 == 0).all()


def test_statistics_are_of_each_image_and_of_finite_values():
    x = torch.full((3, 3, 2, 2), 0.5)
    x[0, 1, 0, 0], x[0, 2, 1, 1] = -0.25, 1.75
    x[1, 0] = float("nan")
    x[1, 1, 0, 0] = -float("inf")
    x[2] = float("inf")
    result = quantise(x)
    assert result.minimum_B.tolist() == [-0.25, 0.5, float("inf")]
    assert result.maximum_B.tolist() == [1.75, 0.5, -float("inf")]
    assert result.nonfinite_B.tolist() == [0, 5, 12]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_opcheck(dtype, memory_format):
    x = images((2, 3, 5, 7), dtype=dtype).contiguous(memory_format=memory_format)
    torch.library.opcheck(torch.ops.ubgen.quantise.default, (x,))


def test_has_no_gradient():
    x = images((1, 3, 4, 4)).requires_grad_()
    with pytest.raises(RuntimeError, match=r"no autograd formula"):
        quantise(x).maximum_B.sum().backward()


@pytest.mark.parametrize(
    "wrong", [torch.zeros(1, 4, 2, 2), torch.zeros(3, 2, 2), torch.zeros(1, 3, 2, 2, dtype=torch.uint8)]
)
def test_refuses_what_is_not_images(wrong):
    with pytest.raises(ValueError, match=r"images must be floating point \(B, 3, H, W\)"):
        quantise(wrong)
