"""Backbones: networks with weights from `ubgen-pretrain`, from any checkpoint that fits a timm network, or random."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from torch import Tensor, nn

from ubgen.core.classes import load_classes
from ubgen.core.errors import UserError, first_line
from ubgen.core.stage import read_manifest
from ubgen.core.weights import read_json_object, require_timm_model
from ubgen.evaluate.checkpoint import Weights, fitted, is_head, read_tensors
from ubgen.loading.decode import MEAN, STD, EvaluationTransform

Precision = Literal["auto", "no", "bf16"]
FORMS = "a directory of ubgen-pretrain, timm:MODEL@FILE, or random:MODEL or random:MODEL@SEED"
_FILES: dict[Weights, str] = {"raw": "model.safetensors", "ema": "model_ema.safetensors"}
_IMAGENET = 1000


@dataclass(frozen=True)
class Backbone:
    """A network in evaluation mode on its device."""

    name: str
    """For tables."""
    model_name: str
    """timm's name of the network."""
    identity: str
    """ "sha256:<hex>" of weights, network options and input settings; equal ones give equal features."""
    image_size: int
    """Side of the square input in pixels."""
    mean: tuple[float, float, float]
    """Of the input's channels, as values in [0, 1]."""
    std: tuple[float, float, float]
    crop_ratio: float
    """Share of the shorter side that the centre crop takes when its own accuracy is measured (`ubgen-eval val`)."""
    interpolation: Literal["bicubic", "bilinear"]
    """How images are resized for that."""
    class_ids: tuple[str, ...] | None
    """In the order of the logits; None where nothing says what the logits mean."""
    dim: int
    """Length of a feature."""
    outputs: int
    """Number of logits; 0 without a classifier."""
    network: nn.Module = field(repr=False)
    device: torch.device
    precision: Literal["no", "bf16"]
    """"bf16": computed under autocast."""

    def transform(self, crop_ratio: float = 1.0) -> EvaluationTransform:
        """The protocol's: shorter side to the input size (bicubic), centre crop, this backbone's mean and deviation."""
        return EvaluationTransform(self.image_size, crop_ratio, self.mean, self.std)

    def own_transform(self) -> EvaluationTransform:
        """The one with which its weights are evaluated on their own task."""
        return EvaluationTransform(self.image_size, self.crop_ratio, self.mean, self.std, self.interpolation)

    def features(self, images: Tensor) -> Tensor:
        """(B, D) float32 on the device: what the classifier reads, of normalised images (B3HW).

        Pooled over the image; of a vision transformer the class token after the last norm, where it pools so.
        """
        network: Any = self.network
        with torch.inference_mode(), self._autocast():
            return network.forward_head(network.forward_features(images), pre_logits=True).flatten(1).float()

    def logits(self, images: Tensor) -> Tensor:
        """(B, K) float32 on the device. UserError without a classifier.

        The classifier computes in float32 under autocast, too: bf16 has so few digits that the largest two of 1,000
        logits are often equal.
        """
        if not self.outputs:
            raise UserError(
                f"backbone {self.name}: its weights hold no classifier, so it cannot name classes"
            )
        network: Any = self.network
        with torch.inference_mode():
            with self._autocast():
                maps = network.forward_features(images)
            return network.forward_head(maps.float())

    def on_device(self, images: Tensor) -> Tensor:
        """A batch as the network takes it."""
        return images.to(self.device, memory_format=torch.channels_last, non_blocking=True)

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")


def load_backbone(
    spec: str | Path,
    *,
    device: str = "auto",
    weights: Weights = "ema",
    classes: str | Sequence[str] | None = None,
    image_size: int | None = None,
    precision: Precision = "auto",
) -> Backbone:
    """The backbone that `spec` names: a directory of `ubgen-pretrain`, `timm:MODEL@FILE`, or `random:MODEL[@SEED]`.

    FILE is safetensors, or PyTorch's format with nothing but tensors and plain values. Its tensors may be nested under
    names such as `state_dict` or `model_ema` and have prefixes such as `module.` or `backbone.`; the classifier may be
    missing or have any number of classes. All else must fit, name by name and size by size.
    `weights`: of a run or checkpoint with a moving average as well, which of the two. `classes`: ids in the order of
    the logits (a class list's name or file, or the ids), where the weights do not say. `image_size` overrides the input
    size. `precision`: "auto" is bf16 on a GPU, float32 elsewhere.

    UserError, one line, for everything that does not fit; weights are never left random but where `spec` says so.
    """
    if weights not in _FILES:
        raise UserError(f'weights must be "ema" or "raw", not {weights!r}')
    kind, _, rest = str(spec).partition(":")
    if kind == "timm" and rest:
        made = _from_checkpoint(rest, weights, image_size)
    elif kind == "random" and rest:
        made = _at_random(rest, image_size)
    else:
        made = _from_run(spec, weights, image_size)
    return _finished(made, _device(device), _class_ids(classes), precision)


@dataclass
class _Made:
    """A network with its weights, before it is tried."""

    name: str
    model_name: str
    options: dict[str, Any]
    network: nn.Module
    image_size: int
    class_ids: tuple[str, ...] | None
    mean: tuple[float, float, float] = MEAN
    std: tuple[float, float, float] = STD
    crop_ratio: float = 1.0
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"


def _from_run(spec: str | Path, weights: Weights, image_size: int | None) -> _Made:
    path = Path(spec).expanduser()
    if not path.is_dir():
        raise UserError(f"backbone {spec}: no such directory; a backbone is {FORMS}")
    read_manifest(path, "pretrain")
    config = read_json_object(path / "config.json")
    try:
        model, recipe = str(config["architecture"]), config["recipe"]
        options, ids = dict(config["timm"]), tuple(map(str, config["class_ids"]))
        size, crop = int(recipe["image_size"]), float(recipe["crop_ratio"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path / 'config.json'} is not of ubgen-pretrain ({type(error).__name__}: {error})"
        ) from None
    if options.get("num_classes") != len(ids):
        raise UserError(
            f"{path / 'config.json'}: {len(ids)} class ids, but the network has {options.get('num_classes')} outputs"
        )
    network = _created(model, options, f"{path / 'config.json'}: architecture")
    file = path / _FILES[weights]
    network.load_state_dict(fitted(read_tensors(file, weights), network, file, weights, model))
    name = path.resolve().name + (" (raw)" if weights == "raw" else "")
    return _Made(name, model, options, network, image_size or size, ids, crop_ratio=crop)


def _from_checkpoint(text: str, weights: Weights, image_size: int | None) -> _Made:
    model, _, file = text.partition("@")
    if not file:
        raise UserError(
            f"backbone timm:{text}: write timm:MODEL@FILE; without a file it would be a random network, "
            f"which is random:{model}"
        )
    path = Path(file).expanduser()
    require_timm_model(model, f"backbone timm:{text}")
    tensors = read_tensors(path, weights)
    settings = _settings(model, path)
    size = image_size or settings["input_size"][-1]
    options = _size_options(model, size) | {"num_classes": settings["num_classes"]}
    network = _created(model, options, f"backbone timm:{text}")
    state = fitted(tensors, network, path, weights, model, any_classifier=True)
    outputs = _outputs(state, network)
    if outputs != options["num_classes"]:
        options["num_classes"] = outputs
        network = _created(model, options, f"backbone timm:{text}")
    network.load_state_dict(
        {name: value for name, value in state.items() if outputs or not is_head(name, network)}
    )
    ids = load_classes("imagenet1k").ids if outputs == _IMAGENET else None
    return _Made(
        f"{model}@{path.stem}",
        model,
        options,
        network,
        size,
        ids,
        tuple(settings["mean"]),
        tuple(settings["std"]),
        float(settings["crop_pct"]),
        "bilinear" if settings["interpolation"] == "bilinear" else "bicubic",
    )


def _at_random(text: str, image_size: int | None) -> _Made:
    model, _, seed = text.partition("@")
    if seed and not seed.isdecimal():
        raise UserError(f"backbone random:{text}: the seed must be a whole number, not {seed!r}")
    require_timm_model(model, f"backbone random:{text}")
    size = image_size or _settings(model, None)["input_size"][-1]
    options = _size_options(model, size) | {"num_classes": 0}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(seed or 0))
        network = _created(model, options, f"backbone random:{text}")
    return _Made(f"random {model} (seed {int(seed or 0)})", model, options, network, size, None)


def _settings(model: str, path: Path | None) -> dict[str, Any]:
    """timm's settings of the network's input, overridden by timm's config.json beside the weights if there is one."""
    default = timm.get_pretrained_cfg(model)
    known: dict[str, Any] = default.to_dict() if default is not None else {}
    beside = path.parent / "config.json" if path is not None else None
    if beside is not None and beside.is_file():
        content = read_json_object(beside)
        if content.get("architecture") == model.partition(".")[0]:
            known |= {k: v for k, v in content.get("pretrained_cfg", {}).items() if v is not None}
    chosen = {name: known.get(name) for name in ("input_size", "mean", "std", "crop_pct", "interpolation")}
    usual = {
        "input_size": (3, 224, 224),
        "mean": MEAN,
        "std": STD,
        "crop_pct": 0.875,
        "interpolation": "bicubic",
    }
    return {name: chosen[name] or value for name, value in usual.items()} | {
        "num_classes": known.get("num_classes") or _IMAGENET
    }


def _size_options(model: str, size: int) -> dict[str, Any]:
    """A network whose weights depend on the input size is built for it."""
    settings = timm.get_pretrained_cfg(model)
    return {"img_size": size} if settings is not None and settings.fixed_input_size else {}


def _created(model: str, options: Mapping[str, Any], where: str) -> nn.Module:
    require_timm_model(model, where)
    try:
        return timm.create_model(model, pretrained=False, **options)
    except (TypeError, AssertionError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{where}: timm cannot build {model} with {dict(options)} ({first_line(error)})"
        ) from None


def _outputs(state: Mapping[str, Tensor], network: nn.Module) -> int:
    """Rows of a linear classifier; 0 where the file holds none, or another head."""
    head = {name: tensor for name, tensor in state.items() if is_head(name, network)}
    wanted = {name for name in network.state_dict() if is_head(name, network)}
    if not head or head.keys() != wanted:
        return 0
    rows = {len(tensor) for tensor in head.values()}
    fits = all(tensor.shape[1:] == network.state_dict()[name].shape[1:] for name, tensor in head.items())
    return rows.pop() if fits and len(rows) == 1 else 0


def _class_ids(classes: str | Sequence[str] | None) -> tuple[str, ...] | None:
    if classes is None:
        return None
    return load_classes(classes).ids if isinstance(classes, str) else tuple(classes)


def _device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {device}: PyTorch finds no CUDA device here")
    return torch.device(device)


@torch.inference_mode()
def _finished(
    made: _Made, device: torch.device, ids: tuple[str, ...] | None, precision: Precision
) -> Backbone:
    outputs = int(made.options["num_classes"])
    ids = ids if ids is not None else made.class_ids
    if ids is not None and outputs and len(ids) != outputs:
        raise UserError(
            f"backbone {made.name}: it has {outputs} outputs, but the class list has {len(ids)} classes"
        )
    network: Any = made.network.eval()
    blank = torch.zeros(1, 3, made.image_size, made.image_size)
    try:
        feature = network.forward_head(network.forward_features(blank), pre_logits=True).flatten(1)
    except (AssertionError, ValueError, RuntimeError) as error:
        raise UserError(
            f"backbone {made.name}: it does not take images of {made.image_size} pixels ({first_line(error)})"
        ) from None
    kind = precision if precision != "auto" else "bf16" if device.type == "cuda" else "no"
    return Backbone(
        name=made.name,
        model_name=made.model_name,
        identity=_identity(made, kind),
        image_size=made.image_size,
        mean=made.mean,
        std=made.std,
        crop_ratio=made.crop_ratio,
        interpolation=made.interpolation,
        class_ids=ids if outputs else None,
        dim=feature.shape[1],
        outputs=outputs,
        network=network.to(device, memory_format=torch.channels_last),
        device=device,
        precision=kind,
    )


def _identity(made: _Made, precision: str) -> str:
    settings = [made.model_name, made.options, made.image_size, made.mean, made.std, precision]
    total = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, tensor in sorted(made.network.state_dict().items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy())
    return f"sha256:{total.hexdigest()}"
