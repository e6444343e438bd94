"""The contract of a network: what fits its signature runs, anything else is refused by name."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from ubgen.core.errors import UserError
from ubgen.runtime import Dim, Network, Signature, TensorSpec

ROWS = Dim("batch", 2, 4, 8)
SIGNATURE = Signature(
    inputs=(
        TensorSpec("latents", torch.float32, (ROWS, 4, 3)),
        TensorSpec("timestep", torch.int64, (ROWS,)),
    ),
    outputs=(TensorSpec("noise", torch.float32, (ROWS, 4, 3)),),
)


class Scale(Network):
    def _run(self, inputs: dict[str, Tensor], sizes: dict[str, int]) -> dict[str, Tensor]:
        assert inputs["latents"].is_contiguous()
        return {"noise": inputs["latents"] * inputs["timestep"].view(-1, 1, 1)}


def fitting(batch: int = 3) -> dict[str, Tensor]:
    return {"latents": torch.ones(batch, 4, 3), "timestep": torch.arange(batch)}


@pytest.mark.parametrize("batch", [2, 5, 8])
def test_every_batch_of_the_range_runs(batch: int) -> None:
    noise = Scale("unet", SIGNATURE).run(fitting(batch))["noise"]
    assert torch.equal(noise[:, 0, 0], torch.arange(batch).float())


def test_strided_and_gradient_carrying_inputs_are_taken() -> None:
    latents = torch.ones(3, 3, 4, requires_grad=True).transpose(1, 2)
    noise = Scale("unet", SIGNATURE).run({**fitting(), "latents": latents})["noise"]
    assert not noise.requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latents": None}, "unet: input 'latents' is missing; it takes latents, timestep"),
        ({"extra": torch.ones(3)}, "unet: no input is named 'extra'"),
        ({"latents": torch.ones(3, 4, 3).double()}, r"'latents' is float64 .* expected float32"),
        ({"latents": torch.ones(3, 4, 4)}, r"\(3, 4, 4\); expected float32 \(batch 2..8, 4, 3\)"),
        ({"latents": torch.ones(9, 4, 3)}, r"\(9, 4, 3\); expected float32 \(batch 2..8"),
        ({"latents": torch.ones(1, 4, 3)}, r"\(1, 4, 3\)"),
        ({"latents": torch.ones(3, 4)}, r"\(3, 4\)"),
        ({"timestep": torch.arange(4)}, "with batch = 3 as in the other inputs"),
        ({"latents": torch.ones(3, 4, 3, device="meta")}, "is on meta; the engine runs on cpu"),
    ],
)
def test_an_input_that_does_not_fit_is_named(change: dict[str, Tensor | None], message: str) -> None:
    inputs = {name: t for name, t in {**fitting(), **change}.items() if t is not None}
    with pytest.raises(UserError, match=message):
        Scale("unet", SIGNATURE).run(inputs)


def test_a_signature_survives_json() -> None:
    assert Signature.from_dict(SIGNATURE.to_dict()) == SIGNATURE
    assert SIGNATURE.batch == ROWS


def test_the_measure_of_memory_sees_what_a_network_keeps(growth: Callable[..., int]) -> None:
    """At 16 KiB a call, 2,000 calls keep more than the 8 MiB that the compilers' tests allow."""
    kept = list[bytes]()

    class Hoarder(Scale):
        def _run(self, inputs: dict[str, Tensor], sizes: dict[str, int]) -> dict[str, Tensor]:
            kept.append(bytes([len(kept) % 256]) * 2**14)
            return super()._run(inputs, sizes)

    assert growth(Hoarder("unet", SIGNATURE), fitting()) > 8 * 2**20
    assert growth(Scale("unet", SIGNATURE), fitting()) < 8 * 2**20


class Flags(Network):
    """Notes what PyTorch's settings are while it runs, and waits for another that does the same."""

    def __init__(self, together: threading.Barrier) -> None:
        super().__init__("unet", SIGNATURE, "meta")
        self._together = together
        self.seen: list[bool] = []

    def _run(self, inputs: dict[str, Tensor], sizes: dict[str, int]) -> dict[str, Tensor]:
        for _ in range(2):
            self._together.wait(10)
            self.seen += [torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32]
        return {}


def test_away_from_the_cpu_float32_is_exact_also_between_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    inputs = {name: tensor.to("meta") for name, tensor in fitting().items()}
    networks = [Flags(together := threading.Barrier(2)), Flags(together)]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda network: network.run(inputs), networks))
    assert [network.seen for network in networks] == [[False] * 4] * 2
    assert torch.backends.cudnn.allow_tf32
