"""PyTorch module -> ONNX file."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ubgen.export.networks import Exportable
from ubgen.export.spec import NetworkSpec

_EMBED_LIMIT = 2**30  # bytes of weights; a protobuf file ends at 2 GiB, larger ones go to a file beside it


def export_onnx(network: Exportable, spec: NetworkSpec, path: Path) -> list[Path]:
    """Write `path` (and `path`.data when the weights are large); the batch is free within the spec's range.

    Returns the files written, the graph first.
    """
    # traced on two rows, because a single one would become a constant of the graph
    rows = min(2, spec.batch.max)
    example = {name: tensor[:rows] for name, tensor in network.inputs[0].items()}
    data = path.with_name(f"{path.name}.data")
    data.unlink(missing_ok=True)  # of an engine that is being replaced
    size = sum(p.numel() * p.element_size() for p in network.module.parameters())
    with torch.no_grad(), _quiet():
        torch.onnx.export(
            network.module,
            args=(),
            kwargs=example,
            f=str(path),
            input_names=list(example),
            output_names=[network.output],
            opset_version=spec.opset,
            dynamo=True,
            external_data=size > _EMBED_LIMIT,
            dynamic_shapes=_dynamic_shapes(example, spec),
            verbose=False,
        )
    return [path, data] if data.exists() else [path]


def _dynamic_shapes(
    example: dict[str, torch.Tensor], spec: NetworkSpec
) -> dict[str, dict[int, object]] | None:
    if spec.batch.max == 1:
        return None
    rows = torch.export.Dim("batch", min=spec.batch.min, max=spec.batch.max)
    return {name: {0: rows} for name in example}


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter warns about its own internals and about names of axes that are shared on purpose."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
