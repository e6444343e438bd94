"""The CUDA twin of the fused operation."""

import pytest
import torch

from ubgen.ops import cuda_status, guided_step
from ubgen.ops.step import guided_step_reference

pytestmark = pytest.mark.gpu
WEIGHTS = [[1.0], [3 / 2, -1 / 2], [23 / 12, -16 / 12, 5 / 12], [55 / 24, -59 / 24, 37 / 24, -9 / 24]]


def test_the_cuda_library_is_there():
    available, reason = cuda_status()
    assert available, reason


@pytest.mark.parametrize("offset", [0, 1])  # 1: addresses that 16-byte loads cannot take
@pytest.mark.parametrize("size", [0, 1, 5, 1024, 1_000_003])
@pytest.mark.parametrize("depth", [0, 1, 2, 3])
def test_equals_the_reference_bit_for_bit(size, depth, offset):
    x, uncond, cond, *history = (torch.randn(size + offset)[offset:] for _ in range(3 + depth))
    rest = (1.1189641, -0.11945176, 2.0, WEIGHTS[depth])
    wanted = guided_step_reference(x, uncond, cond, history, *rest)
    x, uncond, cond, *history = (
        torch.cat([t.new_zeros(offset), t]).cuda()[offset:] for t in (x, uncond, cond, *history)
    )
    got = guided_step(x, uncond, cond, history, *rest)
    for one, other in zip(got, wanted, strict=True):
        assert torch.equal(one.cpu(), other)
