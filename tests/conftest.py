"""What holds for all tests."""

import pytest
import torch


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A folder's tests share fixtures, so one process runs them all; GPU tests are skipped where there is none."""
    for item in items:
        item.add_marker(pytest.mark.xdist_group(str(item.path.parent)))
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)
