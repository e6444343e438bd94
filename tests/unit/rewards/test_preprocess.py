from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from ubgen.rewards import clip_preprocess, pad_to_square, qalign_preprocess
from ubgen.rewards.preprocess import CLIP_MEAN, CLIP_STD, PAD_COLOUR, resize

GOLDEN = Path(__file__).parents[2] / "golden"
STD = torch.tensor(CLIP_STD)[:, None, None]


@pytest.fixture(scope="module")
def released() -> dict[str, Tensor]:
    return load_file(GOLDEN / "reference/preprocess.safetensors")


@pytest.fixture(scope="module")
def pil_path() -> dict[str, Tensor]:
    return load_file(GOLDEN / "qalign/preprocess.safetensors")


def released_input(data: dict[str, Tensor], case: str) -> Tensor:
    if f"{case}.input" in data:
        return data[f"{case}.input"]
    rows, cols = data[f"{case}.input_rows"], data[f"{case}.input_cols"]
    return 0.5 + torch.einsum("rci,rcj->cij", rows, cols)[None]


@pytest.mark.parametrize("case", ["s64x64", "s96x80", "s512x512"])
@pytest.mark.parametrize(
    ("name", "function", "stride"), [("clip", clip_preprocess, 5), ("qalign", qalign_preprocess, 9)]
)
def test_equals_the_released_code(released, case, name, function, stride):
    images = released_input(released, case).requires_grad_()
    out = function(images)
    weight = released[f"{case}.{name}.weight_rows"][..., :, None]
    weight = weight * released[f"{case}.{name}.weight_cols"][..., None, :]
    (grad,) = torch.autograd.grad((out * weight).sum(), images)

    def check(value: Tensor, key: str, atol: float) -> None:
        torch.testing.assert_close(value, released[f"{case}.{name}.{key}"], rtol=0, atol=atol)

    check(out[..., ::stride, ::stride], "out_strided", 2e-3)
    check(out.sum(-1), "out_row_sum", 1e-2)
    check(out.sum(-2), "out_col_sum", 1e-2)
    expected = released[f"{case}.{name}.grad"]
    grad = grad if grad.shape == expected.shape else grad[..., ::9, ::9]
    assert (grad - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("case", ["wide", "tall", "square_down", "square_up", "same"])
@pytest.mark.parametrize(("quantise", "most", "mean"), [(False, 1.1, 0.3), (True, 1.001, 0.003)])
def test_padded_path_equals_pil(pil_path, case, quantise, most, mean):
    images = pil_path[f"{case}.image_uint8"].permute(2, 0, 1)[None] / 255
    pixels = qalign_preprocess(images, 56, fit="pad", quantise=quantise)[0]
    levels = (pixels - pil_path[f"{case}.pixel_values"]).abs() * STD * 255
    assert levels.max() < (1e-4 if case == "same" else most)
    assert levels.mean() < mean


def test_an_image_of_the_right_size_is_only_normalised(pil_path):
    images = pil_path["same.image_uint8"].permute(2, 0, 1)[None] / 255
    expected = pil_path["same.pixel_values"][None]
    torch.testing.assert_close(qalign_preprocess(images, 56), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(clip_preprocess(images, 56), expected, rtol=0, atol=1e-6)


def test_nothing_is_clamped_in_training():
    images = torch.full((1, 3, 40, 40), 1.5)
    expected = (1.5 - torch.tensor(CLIP_MEAN)) / torch.tensor(CLIP_STD)
    for pixels in (clip_preprocess(images, 32), qalign_preprocess(images, 56)):
        torch.testing.assert_close(pixels.mean((0, 2, 3)), expected)


def test_half_precision_is_computed_in_float32():
    images = torch.rand(1, 3, 40, 40).half()
    expected = clip_preprocess(images.float(), 32)
    assert torch.equal(clip_preprocess(images, 32), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(clip_preprocess(images, 32), expected)


def test_padding_puts_the_odd_pixel_last():
    square = pad_to_square(torch.ones(1, 3, 3, 6))
    colour = torch.tensor(PAD_COLOUR)[:, None]
    assert square.shape == (1, 3, 6, 6)
    torch.testing.assert_close(square[0, :, 0], colour.expand(3, 6))  # 1 row above, 2 below
    assert torch.equal(square[0, :, 1:4], torch.ones(3, 3, 6))
    torch.testing.assert_close(square[0, :, 4:], colour[:, None].expand(3, 2, 6))


def test_rounding_passes_the_gradient():
    images = torch.full((1, 3, 20, 20), 0.4503, requires_grad=True)
    qalign_preprocess(images, 10, quantise=True).sum().backward()
    torch.testing.assert_close(images.grad.sum((0, 2, 3)), 100 / torch.tensor(CLIP_STD))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 70), st.integers(0, 2**31))
def test_any_size_resizes_as_pil_does(height, width, size, seed):
    image = np.random.default_rng(seed).random((height, width), dtype=np.float32)
    expected = np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC))
    ours = resize(torch.from_numpy(image).expand(1, 3, -1, -1), size)[0, 0]
    np.testing.assert_allclose(ours.numpy(), expected, atol=1e-5)


def test_a_cached_matrix_serves_training_after_inference_mode():
    with torch.inference_mode():
        clip_preprocess(torch.rand(1, 3, 41, 37), 29)
    images = torch.rand(1, 3, 41, 37, requires_grad=True)
    clip_preprocess(images, 29).sum().backward()
    assert images.grad.abs().sum() > 0


class Prepared(torch.nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return qalign_preprocess(images, 43, fit="pad")


def test_exports_with_the_matrices_as_constants():
    """Sizes that no other test uses: the matrices are made during the trace, and must serve eager code later."""
    images = torch.rand(2, 3, 51, 38)
    batch = {0: torch.export.Dim("batch", min=1)}
    program = torch.export.export(Prepared(), (images,), dynamic_shapes=(batch,))
    more = torch.rand(3, 3, 51, 38, requires_grad=True)
    expected = Prepared()(more)
    torch.testing.assert_close(program.module()(more), expected)
    expected.sum().backward()
    assert more.grad.abs().sum() > 0
