"""PyTorch's own outputs, where a GPU has too little memory for float32."""

import pytest
import torch
from torch import Tensor, nn

from ubgen.export.exportable import Exportable
from ubgen.export.inputs import expected_outputs, outputs


class Scarce(nn.Linear):
    """Runs out of memory on its first call, as on a GPU that is too small."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return super().forward(x)


def test_what_does_not_fit_is_computed_on_the_cpu() -> None:
    network = Exportable(Scarce(4, 3), [{"x": torch.randn(rows, 4)} for rows in (9, 2)], "y")
    said: list[str] = []
    got = expected_outputs("unet", network, "cpu", said.append)
    assert said == ["unet: does not fit cpu in float32; running PyTorch on the CPU"]
    assert [len(y) for y in got] == [9, 2]
    torch.testing.assert_close(got, [network.reference(inputs) for inputs in network.inputs])


@pytest.mark.gpu
def test_a_gpu_that_is_too_small_holds_nothing_afterwards() -> None:
    network = Exportable(nn.Linear(8192, 8192), [{"x": torch.randn(2, 8192)}], "y")  # 256 MiB
    said: list[str] = []
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    torch.cuda.set_per_process_memory_fraction(
        (before + 2**26) / torch.cuda.get_device_properties(0).total_memory
    )
    try:
        got = expected_outputs("qalign", network, "cuda", said.append)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert said == ["qalign: does not fit cuda in float32; running PyTorch on the CPU"]
    assert torch.cuda.memory_reserved() == before
    assert {tensor.device.type for tensor in (*got, *network.module.parameters())} == {"cpu"}
    torch.testing.assert_close(got, outputs(network, "cuda"), rtol=1e-4, atol=1e-4)
