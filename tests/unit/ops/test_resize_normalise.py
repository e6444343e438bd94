"""Bytes to the pixels of a vision tower: equal to the float preprocessing of the rewards, and to its peers."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms.v2 import functional as peer

from ubgen.ops import reference, resize_normalise
from ubgen.ops.bicubic import resize_bands, resize_weights
from ubgen.rewards import clip_preprocess, preprocess, qalign_preprocess

MEAN, STD = preprocess.CLIP_MEAN, preprocess.CLIP_STD
PAD = (122, 116, 104)


def pixels(batch, height, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch, height, width, 3), dtype=torch.uint8, generator=generator)


def unit(pixels_BHW3):
    return pixels_BHW3.permute(0, 3, 1, 2).float() / 255


def assert_close(got, wanted):
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)


@given(
    batch=st.integers(0, 3),
    height=st.integers(1, 70),
    width=st.integers(1, 70),
    size=st.integers(1, 50),
    padded=st.booleans(),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=120, deadline=None)
def test_equals_the_float_preprocessing(batch, height, width, size, padded, seed):
    images = pixels(batch, height, width, seed)
    border = PAD if padded else None
    got = resize_normalise(images, size, MEAN, STD, border=border)
    assert got.shape == (batch, 3, size, size)
    assert got.is_contiguous()
    assert_close(got, reference.resize_normalise(images, size, MEAN, STD, border=border))
    wanted = qalign_preprocess(unit(images), size, fit="pad" if padded else "squash")
    assert_close(got, wanted)


@pytest.mark.parametrize(("shape", "size"), [((512, 512), 224), ((512, 512), 448), ((300, 517), 224)])
def test_the_sizes_of_clip_and_qalign(threads, shape, size):
    images = pixels(2, *shape)
    assert_close(resize_normalise(images, size, MEAN, STD), clip_preprocess(unit(images), size))
    padded = resize_normalise(images, size, MEAN, STD, border=PAD)
    assert_close(padded, qalign_preprocess(unit(images), size, fit="pad"))


def test_equals_torchvision_up_to_its_rounding():
    images = pixels(1, 96, 128)
    resized = peer.resize(
        unit(images), [40, 40], interpolation=peer.InterpolationMode.BICUBIC, antialias=True
    )
    wanted = peer.normalize(resized, list(MEAN), list(STD))
    torch.testing.assert_close(resize_normalise(images, 40, MEAN, STD), wanted, rtol=0, atol=2e-5)


def test_extreme_contrast_overshoots_unless_bounded():
    images = torch.zeros(1, 32, 32, 3, dtype=torch.uint8)
    images[:, :, 16:] = 255
    free = resize_normalise(images, 64, (0, 0, 0), (1, 1, 1))
    bounded = resize_normalise(images, 64, (0, 0, 0), (1, 1, 1), border=PAD)
    assert free.min() < -0.01
    assert free.max() > 1.01
    assert bounded.min() == 0
    assert bounded.max() == 1


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t[:, ::2, 1:],
        lambda t: t.transpose(1, 2),
        lambda t: t.flip(3),
        lambda t: t[:1].expand(3, -1, -1, -1),
    ],
    ids=["cut", "transposed", "flipped", "expanded"],
)
def test_strided_inputs(view):
    images = view(pixels(2, 20, 26))
    assert_close(resize_normalise(images, 9, MEAN, STD), reference.resize_normalise(images, 9, MEAN, STD))


@pytest.mark.parametrize(
    ("source", "target"), [(512, 224), (512, 448), (64, 224), (37, 5), (3, 9), (1, 4), (7, 7)]
)
def test_bands_hold_all_the_weights(source, target):
    dense = resize_weights(source, target)
    first, weights = resize_bands(source, target)
    rebuilt = np.zeros((target, source))
    for row, start, values in zip(rebuilt, first, weights, strict=True):
        row[start : start + len(values)] = values
    np.testing.assert_allclose(rebuilt, dense, rtol=0, atol=1e-7)


@pytest.mark.parametrize("border", [None, list(PAD)])
def test_opcheck(border):
    arguments = (pixels(2, 9, 12), 5, list(MEAN), list(STD), border)
    torch.library.opcheck(torch.ops.ubgen.resize_normalise.default, arguments)


@pytest.mark.parametrize(
    ("wrong", "size", "message"),
    [
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), 4, "pixels must be uint8"),
        (torch.zeros(1, 8, 8, 3), 4, "pixels must be uint8"),
        (torch.zeros(8, 8, 3, dtype=torch.uint8), 4, "pixels must be uint8"),
        (torch.zeros(1, 0, 8, 3, dtype=torch.uint8), 4, "cannot make 4x4"),
        (torch.zeros(1, 8, 8, 3, dtype=torch.uint8), 0, "cannot make 0x0"),
    ],
)
def test_refuses_what_does_not_fit(wrong, size, message):
    with pytest.raises(ValueError, match=message):
        resize_normalise(wrong, size, MEAN, STD)
