"""Which calls are replayed. What a replay does is shown on a GPU, in tests/gpu."""

import torch
from torch import Tensor

from ubgen.runtime.cuda_graphs import LIMIT, GraphedCalls, Inputs, Replay, Sizes


class Recorder:
    """Doubles its input, and notes how it was made to."""

    def __init__(self) -> None:
        self.ordinary: list[int] = []
        self.captured: list[int] = []
        self.replayed: list[int] = []

    def run(self, inputs: Inputs, sizes: Sizes) -> dict[str, Tensor]:
        self.ordinary.append(sizes["batch"])
        return {"y": inputs["x"] * 2}

    def capture(self, inputs: Inputs, sizes: Sizes) -> Replay:
        batch = sizes["batch"]
        self.captured.append(batch)

        def replay(inputs: Inputs) -> dict[str, Tensor]:
            self.replayed.append(batch)
            return {"y": inputs["x"] * 2}

        return replay


def call(calls: GraphedCalls, batch: int) -> None:
    x = torch.arange(batch).float()
    assert torch.equal(calls({"x": x}, {"batch": batch})["y"], x * 2)


def test_a_size_that_comes_again_is_captured_once_and_replayed() -> None:
    recorder = Recorder()
    calls = GraphedCalls(recorder.run, recorder.capture)
    for batch in (8, 8, 8, 3, 8):
        call(calls, batch)
    assert recorder.ordinary == [8, 3]
    assert recorder.captured == [8]
    assert recorder.replayed == [8, 8, 8]


def test_graphs_are_limited_whatever_sizes_come() -> None:
    recorder = Recorder()
    calls = GraphedCalls(recorder.run, recorder.capture)
    sizes = list(range(1, LIMIT + 4))
    for batch in sizes * 3:
        call(calls, batch)
    assert recorder.captured == sizes[:LIMIT]
    assert recorder.ordinary == sizes + sizes[LIMIT:] * 2
