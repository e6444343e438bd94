"""Fixed-size calls replayed as CUDA graphs: one launch instead of thousands."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Inputs = Mapping[str, Tensor]
Sizes = Mapping[str, int]
Replay = Callable[[Inputs], dict[str, Tensor]]
"""Inputs of one size -> outputs."""

LIMIT = 4
"""Sizes that are kept as graphs; each holds its activations."""


class GraphedCalls:
    """Runs each size of call as it comes, and from its second coming on as a graph, for at most `LIMIT` sizes.

    A size that comes once (the rest of a run, say) is not worth the capture; sizes beyond the limit run as they are.
    `run(inputs, sizes)` makes an ordinary call; `capture(inputs, sizes)` returns the replay of a call of that size.
    """

    def __init__(
        self,
        run: Callable[[Inputs, Sizes], dict[str, Tensor]],
        capture: Callable[[Inputs, Sizes], Replay],
    ) -> None:
        self._run = run
        self._capture = capture
        self._seen: set[tuple[int, ...]] = set()
        self._replays: dict[tuple[int, ...], Replay] = {}

    def __call__(self, inputs: Inputs, sizes: Sizes) -> dict[str, Tensor]:
        key = tuple(sizes[name] for name in sorted(sizes))
        if key not in self._replays:
            if key not in self._seen or len(self._replays) == LIMIT:
                self._seen.add(key)
                return self._run(inputs, sizes)
            self._replays[key] = self._capture(inputs, sizes)
        return self._replays[key](inputs)


class TorchGraph:
    """One call of fixed shapes and addresses, captured by torch.

    Inputs are copied into the captured tensors and outputs out of them, so that the results of earlier calls stay.
    `run` must use the current stream and nothing else.
    """

    def __init__(self, run: Replay, inputs: Inputs) -> None:
        self._inputs = {name: tensor.clone() for name, tensor in inputs.items()}
        device = next(iter(self._inputs.values())).device
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            run(self._inputs)  # a first call allocates and loads kernels, which cannot be captured
        stream.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        # what other threads ask of the GPU meanwhile, memory for example, must not end the capture
        with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
            self._outputs = run(self._inputs)

    def __call__(self, inputs: Inputs) -> dict[str, Tensor]:
        for name, tensor in inputs.items():
            self._inputs[name].copy_(tensor)
        self._graph.replay()
        return {name: tensor.clone() for name, tensor in self._outputs.items()}
