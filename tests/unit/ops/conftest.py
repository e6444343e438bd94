"""What the tests of the fused operations share."""

import pytest
import torch

from ubgen.ops import native_status


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
