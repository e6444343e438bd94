"""Engine specs: one TOML file per deployable set of networks."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ubgen.config import engine_spec_path, from_dict, read_toml, to_dict
from ubgen.errors import UserError
from ubgen.runtime.backends import compiler_version


@dataclass(frozen=True)
class BatchRange:
    """Rows that one call of the network may have; `best` is what synthesis uses unless told otherwise."""

    min: int
    best: int
    max: int


@dataclass(frozen=True)
class NetworkSpec:
    """`tolerance`: largest |difference| from PyTorch over largest |value|; for 8-bit pixels, the share of values
    that may differ by more than one grey level."""

    batch: BatchRange
    tolerance: float
    compiler: str = "onnxruntime"
    precision: Literal["float32"] = "float32"
    # 18 to 23 ran the miniature's UNet within 7 % of each other on ONNX Runtime's CPU kernels, 20 first
    opset: int = 20


@dataclass(frozen=True)
class Networks:
    text_encoder: NetworkSpec
    unet: NetworkSpec
    vae_decoder: NetworkSpec
    clip_image: NetworkSpec
    clip_text: NetworkSpec
    qalign: NetworkSpec

    def items(self) -> list[tuple[str, NetworkSpec]]:
        return [(f.name, getattr(self, f.name)) for f in dataclasses.fields(self)]


@dataclass(frozen=True)
class Weights:
    """Directories in their field's own formats; "ubgen:…" lies inside the package."""

    stable_diffusion: str
    clip: str
    qalign: str


@dataclass(frozen=True)
class ParityInputs:
    """Real inputs: images of these classes, sampled with PNDM by PyTorch."""

    classes: str
    images: int = 4
    steps: int = 10
    guidance: float = 2.0
    seed: int = 0


@dataclass(frozen=True)
class EngineSpec:
    weights: Weights
    networks: Networks
    parity: ParityInputs
    device: str = field(default="cpu")

    def content(self) -> dict[str, Any]:
        """What the engine key depends on: everything but where the weights lie (their bytes are hashed instead)."""
        content = to_dict(self)
        del content["weights"]
        return content


def load_spec(name_or_path: str | Path, **weights: str | Path | None) -> EngineSpec:
    """The spec of that name or file; `weights` (stable_diffusion, clip, qalign) replace its paths where given.

    UserError names the file and the key for anything unknown, mistyped or impossible, before any work is done.
    """
    path = engine_spec_path(name_or_path)
    spec = from_dict(read_toml(path), EngineSpec, str(path))
    _check(spec, path)
    given = {name: str(value) for name, value in weights.items() if value is not None}
    return dataclasses.replace(spec, weights=dataclasses.replace(spec.weights, **given))


def _check(spec: EngineSpec, path: Path) -> None:
    for name, network in spec.networks.items():
        batch = network.batch
        if not 1 <= batch.min <= batch.best <= batch.max:
            raise UserError(
                f"{path}: networks.{name}.batch must have 1 <= min <= best <= max, not {to_dict(batch)}"
            )
        if network.tolerance <= 0:
            raise UserError(f"{path}: networks.{name}.tolerance must be above 0, not {network.tolerance}")
        if not 18 <= network.opset <= 23:
            raise UserError(f"{path}: networks.{name}.opset must be 18..23, not {network.opset}")
        compiler_version(network.compiler)
    if min(spec.parity.images, spec.parity.steps) < 2:
        raise UserError(f"{path}: parity.images and parity.steps must be at least 2")
    if spec.device != "cpu":
        raise UserError(f"{path}: device must be 'cpu' for ONNX Runtime here, not {spec.device!r}")
