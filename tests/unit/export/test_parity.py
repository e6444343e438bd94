"""The comparison with PyTorch measures the worst case and lets nothing wrong pass."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from ubgen.export.exportable import Exportable
from ubgen.export.parity import (
    EQUAL_PSNR,
    Images,
    ParityRow,
    PipelineRow,
    check_parity,
    compare_images,
    row_errors,
    write_report,
)
from ubgen.export.spec import BatchRange, NetworkSpec, ParitySpec, PipelineTolerance
from ubgen.runtime import Network

SPEC = NetworkSpec(BatchRange(1, 2, 3), tolerance=1e-3)
SETTINGS = ParitySpec("list.txt", PipelineTolerance(40.0, 0.9, 0.01, 0.1))


class Half(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / 2


class Levels(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.to(torch.uint8)


class Scaled(nn.Module):
    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return x * scale


class Compiled(Network):
    """Stands where a compiler's output would: PyTorch plus a chosen error, and how many rows each call had."""

    def __init__(self, network: Exportable, error: Tensor | float, batch: BatchRange = SPEC.batch) -> None:
        super().__init__("net", network.signature(batch))
        self._network, self._error = network, error
        self.calls: list[int] = []

    def _run(self, inputs: dict[str, Tensor], sizes: dict[str, int]) -> dict[str, Tensor]:
        result = self._network.reference(inputs)
        self.calls.append(len(result))
        return {"y": (result + self._error).to(result.dtype)}


def check(network: Exportable, error: Tensor | float, tolerance: float = 1e-3) -> ParityRow:
    expected = [network.reference(inputs) for inputs in network.inputs]
    spec = dataclasses.replace(SPEC, tolerance=tolerance)
    return check_parity("net", Compiled(network, error), network, expected, spec)


def test_difference_is_relative_to_the_largest_value() -> None:
    network = Exportable(Half(), [{"x": torch.full((5, 2), 8.0)}, {"x": torch.ones(2, 2)}], "y")
    row = check(network, 0.002)
    assert row.rows == 5 + 1 + 2 + 1
    assert abs(row.max_abs - 0.002) < 1e-6
    assert abs(row.error - 0.0005) < 1e-6
    assert row.passed
    assert not check(network, 0.2).passed


def test_pixels_count_when_more_than_one_level_off() -> None:
    network = Exportable(Levels(), [{"x": torch.full((3, 4), 100.0)}], "y")
    one_level = check(network, 1)
    assert (one_level.within_one_level, one_level.passed) == (1.0, True)
    error = torch.tensor([2, 0, 0, 0])
    row = check(network, error)
    assert (row.within_one_level, row.error, row.passed) == (0.75, 0.25, False)
    assert check(network, error, tolerance=0.25).passed


def test_nan_fails() -> None:
    network = Exportable(Half(), [{"x": torch.ones(2, 2)}], "y")
    row = check(network, float("nan"))
    assert not row.passed
    assert ParityRow.from_dict(json.loads(json.dumps(row.to_dict()))).rows == row.rows


def test_rows_are_cut_and_filled_and_shared_inputs_stay_whole() -> None:
    inputs = {"x": torch.arange(7.0)[:, None], "scale": torch.tensor([3.0])}
    network = Exportable(Scaled(), [inputs], "y", frozenset({"scale"}))
    batch = BatchRange(2, 2, 3)
    engine = Compiled(network, 0.0, batch)
    spec = dataclasses.replace(SPEC, batch=batch)
    row = check_parity("net", engine, network, [network.reference(inputs)], spec)
    assert (row.error, row.rows) == (0, 7)
    assert engine.calls == [3, 3, 2]


def test_errors_by_row() -> None:
    wanted = torch.tensor([[4.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
    ours = torch.tensor([[4.0, 1.0], [1.0, 1.0], [torch.nan, 0.0]])
    assert row_errors(ours, wanted).tolist() == [0.25, 0.0, torch.inf]
    assert row_errors(ours[:1], wanted[:1], largest=8.0).tolist() == [0.125]
    levels = torch.tensor([[3, 5], [9, 9]], dtype=torch.uint8)
    assert row_errors(levels, torch.zeros(2, 2, dtype=torch.uint8) + 4).tolist() == [0.0, 1.0]


def images(shift: int = 0, similarity: float = 0.0, quality: float = 0.0) -> Images:
    pixels = (torch.arange(2 * 8 * 8 * 3).view(2, 8, 8, 3) % 200 + shift).to(torch.uint8)
    return Images(pixels, torch.tensor([0.2, 0.3 + similarity]), torch.tensor([3.0, 4.0 + quality]))


def test_equal_images() -> None:
    row = compare_images(images(), images(), SETTINGS)
    assert row.passed
    assert (row.psnr, row.within_one_level, row.quality) == (EQUAL_PSNR, 1.0, 0.0)
    assert PipelineRow.from_dict(json.loads(json.dumps(row.to_dict()))) == row


@pytest.mark.parametrize(
    ("ours", "miss"),
    [
        (images(shift=2), "0.00% of values within 1 level, less than 90.00%"),
        (images(shift=30), "PSNR 18.6 dB is below 40.0 dB"),
        (images(similarity=0.02), "CLIP similarity differs by 2.0e-02"),
        (images(quality=-0.5), "quality differs by 5.0e-01"),
        (images(quality=float("nan")), "quality differs by nan"),
    ],
)
def test_every_figure_of_the_images_can_fail_them(ours: Images, miss: str) -> None:
    row = compare_images(ours, images(), SETTINGS)
    assert not row.passed
    assert any(miss in line for line in row.misses)


def test_the_worst_image_is_told() -> None:
    ours = images(shift=1, similarity=0.004)
    ours.pixels[0] = images().pixels[0]
    row = compare_images(ours, images(), SETTINGS)
    assert row.lowest_psnr == pytest.approx(48.13, abs=0.01)
    assert row.psnr == pytest.approx(51.14, abs=0.01)
    assert row.clip_similarity == pytest.approx(0.004, abs=1e-6)
    assert row.mean_clip_similarity == pytest.approx(0.002, abs=1e-6)


def sixteen(*levels: int, quality: float = 0.0) -> Images:
    """Images off by so many levels, the rest equal."""
    shifts = torch.tensor([*levels, *[0] * (16 - len(levels))])
    pixels = (100 + shifts)[:, None, None, None].expand(16, 4, 4, 3).to(torch.uint8)
    return Images(pixels, torch.full((16,), 0.3), torch.full((16,), 3.0 + quality))


@pytest.mark.parametrize(
    ("ours", "own", "miss"),
    [
        (sixteen(40, 40), sixteen(), ""),  # two of sixteen may part at a rounding
        (sixteen(40, 40, 40), sixteen(), "an image has PSNR 16.1 dB; the limit is PSNR 40.0 dB"),
        (sixteen(40, 40, 40), sixteen(40), ""),  # where PyTorch parts in one, three may
        (sixteen(*[6] * 16), sixteen(*[5] * 16), ""),  # all of PyTorch's are beyond the bound
        (sixteen(*[12] * 16), sixteen(*[5] * 16), "an image has PSNR 26.5 dB; the limit is PSNR 31.1 dB"),
        (sixteen(quality=0.3), sixteen(quality=0.2), ""),
        (sixteen(quality=0.5), sixteen(quality=0.2), "an image has quality 5.0e-01 apart; the limit is"),
        (sixteen(quality=float("nan")), sixteen(quality=0.2), "quality nan apart"),
    ],
)
def test_images_in_low_precision_are_held_against_pytorchs_own(ours: Images, own: Images, miss: str) -> None:
    row = compare_images(ours, sixteen(), SETTINGS, own)
    assert any(miss in line for line in row.misses) if miss else row.passed, row.misses
    assert row.lowered is not None
    assert row.lowered["images"] == 16
    assert PipelineRow.from_dict(json.loads(json.dumps(row.to_dict()))).lowered == row.lowered


def test_the_report(tmp_path: Path) -> None:
    network = Exportable(Half(), [{"x": torch.ones(2, 2)}], "y")
    row = dataclasses.replace(check(network, 1e-4), kept_float32=("mid.norm",), error_without=0.5)
    ours, reference = images(shift=3), images()
    write_report(tmp_path, "cpu", [row], compare_images(ours, reference, SETTINGS), ours, reference)
    content = json.loads((tmp_path / "parity.json").read_text(encoding="utf-8"))
    assert content["networks"][0]["kept_float32"] == ["mid.norm"]
    assert content["chain"]["images"] == len(content["images"]) == 2
    table = (tmp_path / "parity.md").read_text(encoding="utf-8")
    assert "mid.norm (error without: 5.00e-01)" in table
    sheet = np.asarray(Image.open(tmp_path / "parity.png"))
    assert sheet.shape == (3 * 10, 72 + 2 * 10, 3)
    assert np.array_equal(sheet[:8, 72:80], reference.pixels[0].numpy())
    assert np.array_equal(sheet[10:18, 82:90], ours.pixels[1].numpy())
    assert (sheet[20:28, 72:80] == 3 * 16).all()
