"""Engine specs: one TOML file per deployable set of networks."""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ubgen.core.config import engine_spec_path, from_dict, read_toml, to_dict
from ubgen.core.errors import UserError
from ubgen.runtime.backends import BACKENDS, backend

Precision = Literal["float32", "float16", "bfloat16", "float8"]
Provider = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class BatchRange:
    """Images (rows of the network's output) that one call may have; `best` is what synthesis uses by default."""

    min: int
    best: int
    max: int


@dataclass(frozen=True)
class Options:
    """Settings of one compiler each (see `Backend.options`), refused at any other."""

    provider: Provider = "cpu"
    """onnxruntime: what runs the graph; "cpu" on the CPU, "cuda" on a GPU."""
    cuda_graphs: bool = False
    """Replay each batch size as one CUDA graph (on a GPU)."""
    refit: bool = False
    """tensorrt: let another LoRA be put into the built engine."""
    workspace_gb: float | None = None
    """tensorrt, torch_tensorrt: scratch memory that a layer may take; None: all of the device."""
    optimization_level: int | None = None
    """tensorrt, torch_tensorrt: 0 (fast build) to 5 (fast engine); None: TensorRT's own choice."""
    freeze: bool = False
    """aotinductor: fold and re-order the weights at compile time."""
    max_autotune: bool = False
    """aotinductor: time several kernels for each matrix product and convolution."""


@dataclass(frozen=True)
class NetworkSpec:
    """`tolerance`: largest |difference| from PyTorch over largest |value|; for 8-bit pixels, the share of values
    that may differ by more than one grey level."""

    batch: BatchRange
    tolerance: float
    compiler: str = "onnxruntime"  # one of BACKENDS
    precision: Precision = "float32"
    # 18 to 23 ran the miniature's UNet within 7 % of each other on ONNX Runtime's CPU kernels, 20 first
    opset: int = 20
    keep_float32: tuple[str, ...] = ()
    """Paths of modules that stay in float32; an export adds those that the tolerance needs."""
    options: Options = field(default_factory=Options)


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
    """Directories in their field's own formats; "ubgen:…" lies inside the package. None: the user must name it."""

    stable_diffusion: str | None = None
    clip: str | None = None
    qalign: str | None = None


@dataclass(frozen=True)
class PipelineTolerance:
    """What the images of all engines together must reach against PyTorch's, from the same noise.

    `psnr` in dB over all images, at least; `within_one_level` the share of pixel values, at least;
    `clip_similarity` and `quality` (1..5) the largest difference of an image, at most. In low precision the bounds are
    for each image, beside what PyTorch's own in that precision differ by (see `compare_images`).
    """

    psnr: float
    within_one_level: float
    clip_similarity: float
    quality: float


@dataclass(frozen=True)
class ParitySpec:
    """Real inputs: images of these classes, sampled with PNDM by PyTorch in float32."""

    classes: str
    chain: PipelineTolerance
    images: int = 16
    steps: int = 10
    guidance: float = 2.0
    seed: int = 0


@dataclass(frozen=True)
class EngineSpec:
    """`image_size`: side of the generated images, in pixels."""

    description: str
    image_size: int
    networks: Networks
    parity: ParitySpec
    weights: Weights = field(default_factory=Weights)
    device: Literal["cpu", "cuda"] = "cpu"

    def content(self) -> dict[str, Any]:
        """What the engine key depends on: not where the weights lie (their bytes are hashed), nor the description."""
        content = to_dict(self)
        del content["weights"], content["description"]
        return content


def load_spec(name_or_path: str | Path, **weights: str | Path | None) -> EngineSpec:
    """The spec of that name or file; `weights` (stable_diffusion, clip, qalign) replace its paths where given.

    A file may start from another spec (`extends`, a name or a file), and may set values for every network at once
    (`defaults`). UserError names the file and the key for anything unknown, mistyped or impossible. Whether this
    machine can build the spec is another question: see `machine_problem`.
    """
    path = engine_spec_path(name_or_path)
    spec = from_dict(_read(path), EngineSpec, str(path))
    if problem := next(_problems(spec), None):
        raise UserError(f"{path}: {problem}")
    given = {name: str(value) for name, value in weights.items() if value is not None}
    return dataclasses.replace(spec, weights=dataclasses.replace(spec.weights, **given))


def _read(path: Path, extended_by: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The spec's tables, over those of the spec that it extends; `defaults` are spread over its networks."""
    values = read_toml(path)
    base, defaults, networks = (
        values.pop("extends", None),
        values.pop("defaults", {}),
        values.get("networks", {}),
    )
    if not isinstance(defaults, dict) or not isinstance(networks, dict):
        raise UserError(f"{path}: defaults and networks must be tables")
    if defaults:
        every = {field.name: defaults for field in dataclasses.fields(Networks)}
        values["networks"] = _merged(every, networks)
    if base is None:
        return values
    if not isinstance(base, str) or path in extended_by:
        raise UserError(f"{path}: extends must name another spec or .toml file, not {base!r}")
    return _merged(_read(engine_spec_path(base), (*extended_by, path)), values)


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`above` over `below`, table by table."""
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if both else value
    return merged


def _problems(spec: EngineSpec) -> Iterator[str]:
    """What no machine could build, one line each."""
    if spec.image_size < 8 or spec.image_size % 8:
        yield f"image_size must be a multiple of 8 pixels, not {spec.image_size}"
    if min(spec.parity.images, spec.parity.steps) < 2:
        yield "parity.images and parity.steps must be at least 2"
    chain = spec.parity.chain
    if not (0 < chain.within_one_level <= 1 and min(chain.psnr, chain.clip_similarity, chain.quality) > 0):
        yield "parity.chain must be above 0, and within_one_level at most 1"
    for name, network in spec.networks.items():
        if network.compiler not in BACKENDS:
            yield f"networks.{name}.compiler must be one of {list(BACKENDS)}, not {network.compiler!r}"
            continue
        for problem in [*_range_problems(network), *_precision_problems(network, spec.device)]:
            yield f"networks.{name}.{problem}"
        for problem in _option_problems(network, spec.device):
            yield f"networks.{name}.options.{problem}"


def _range_problems(network: NetworkSpec) -> Iterator[str]:
    batch = network.batch
    if not 1 <= batch.min <= batch.best <= batch.max:
        yield f"batch must have 1 <= min <= best <= max, not {to_dict(batch)}"
    if not network.tolerance > 0:
        yield f"tolerance must be above 0, not {network.tolerance}"
    if not 18 <= network.opset <= 23:
        yield f"opset must be 18..23, not {network.opset}"


def _precision_problems(network: NetworkSpec, device: str) -> Iterator[str]:
    compiler, precision = network.compiler, network.precision
    possible = backend(compiler).precisions
    if device not in possible:
        yield f'compiler = "{compiler}" needs device = "{next(iter(possible))}", not "{device}"'
    elif precision not in possible[device]:
        known = ", ".join(possible[device])
        yield f'precision = "{precision}" is not supported by {compiler} on device = "{device}"; use one of {known}'
    if precision == "float8" and network.opset > 22:
        yield f'precision = "float8" needs opset 18..22, not {network.opset}: later attention cannot be quantised'
    if network.keep_float32 and precision == "float32":
        yield 'keep_float32 has no effect with precision = "float32"; remove it'


def _option_problems(network: NetworkSpec, device: str) -> Iterator[str]:
    compiler, options = network.compiler, network.options
    for option, value in to_dict(options).items():
        if value != getattr(Options(), option) and option not in backend(compiler).options:
            owners = [name for name, other in BACKENDS.items() if option in other.options]
            yield f"{option} is an option of {' and '.join(owners)}, not of {compiler}"
    if compiler == "onnxruntime" and options.provider != device:
        yield f'provider = "{options.provider}" does not run on device = "{device}"'
    if options.cuda_graphs and device != "cuda":
        yield f'cuda_graphs needs device = "cuda", not "{device}"'
    if options.workspace_gb is not None and not options.workspace_gb > 0:
        yield f"workspace_gb must be above 0, not {options.workspace_gb}"
    if options.optimization_level is not None and not 0 <= options.optimization_level <= 5:
        yield f"optimization_level must be 0..5, not {options.optimization_level}"
