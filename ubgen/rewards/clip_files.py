"""The two layouts in which CLIP is published, open_clip's and transformers', read into one network: open_clip's.

An open_clip directory holds open_clip_config.json and open_clip_model.safetensors. A transformers directory, such as
`openai/clip-vit-large-patch14` as downloaded, holds config.json, model.safetensors (or shards, or pytorch_model.bin)
and the tokenizer's files.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ubgen.core.config import require_directory
from ubgen.core.console import quiet
from ubgen.core.errors import UserError, first_line, warn
from ubgen.core.weights import (
    conversion,
    read_header,
    read_json_object,
    read_tensors,
    require_finite,
    require_real_file,
    weight_files,
)
from ubgen.rewards.preprocess import CLIP_MEAN, CLIP_STD

OPEN_CLIP = "open_clip_config.json"
OPEN_CLIP_WEIGHTS = "open_clip_model.safetensors"
TRANSFORMERS = "config.json"
_OPENAI = {(512, 768, 12, 32), (512, 768, 12, 16), (768, 1024, 24, 14)}
"""Feature width; width, layers and patch size of the image tower: ViT-B/32, ViT-B/16, ViT-L/14."""


class Tokenizer(Protocol):
    """N texts -> (N, T) int64 ids, from the start token to the end token, then zeros."""

    def __call__(self, texts: Sequence[str], /) -> Tensor: ...


@dataclass(frozen=True)
class ClipFiles:
    """A CLIP directory whose files were found whole. `model_cfg` describes the network in open_clip's words."""

    directory: Path
    model_cfg: dict[str, Any]
    weights: list[Path]
    is_transformers: bool

    @property
    def config(self) -> Path:
        return self.directory / (TRANSFORMERS if self.is_transformers else OPEN_CLIP)


def find_clip(path: str | Path, option: str = "the CLIP directory") -> ClipFiles:
    """What lies in a CLIP directory of either layout; reads configs and headers alone, in milliseconds.

    UserError, which names `option` or the file, when a file is missing, damaged or a Git LFS pointer, and for a config
    that needs a download or another preprocessing than CLIP's.
    """
    directory = require_directory(path, option)
    is_open_clip, is_transformers = ((directory / name).is_file() for name in (OPEN_CLIP, TRANSFORMERS))
    if is_open_clip and ((directory / OPEN_CLIP_WEIGHTS).is_file() or not is_transformers):
        files = _find_open_clip(directory)
    elif is_transformers:
        files = _find_transformers(directory)
    else:
        raise UserError(
            f"{option}: {directory} has no {OPEN_CLIP} (open_clip's layout) and no {TRANSFORMERS} (transformers')"
        )
    for file in files.weights:
        read_header(file) if file.suffix == ".safetensors" else require_real_file(file)
    for file in sorted(directory.glob("*.json")):
        read_json_object(file)
    return files


def clip_files(directory: Path) -> list[Path]:
    """What `Clip.load` reads of a directory."""
    small = [file for file in directory.iterdir() if file.suffix in (".json", ".txt")]
    return [*small, *find_clip(directory).weights]


def build_clip(files: ClipFiles) -> nn.Module:
    """The network with its weights, in float32 on the CPU. UserError when the two do not fit, or are not finite."""
    model = _load_transformers(files) if files.is_transformers else _load_open_clip(files)
    require_finite(model.named_parameters(), files.weights[0])
    if not files.model_cfg.get("quick_gelu") and _looks_like_openai(files.model_cfg, model):
        setting, remedy = (
            ('sets hidden_act to "gelu"', 'set hidden_act to "quick_gelu" in text_config and vision_config')
            if files.is_transformers
            else ("does not set quick_gelu", 'add "quick_gelu": true to model_cfg')
        )
        warn(
            f"{files.config} {setting}, but the weights look like OpenAI's, which need quick-GELU: {remedy}, "
            "or all features are a little wrong"
        )
    return model


def meta_clip(files: ClipFiles) -> nn.Module:
    """The network without values, for counting; in milliseconds once open_clip is imported."""
    import open_clip

    with torch.device("meta"), quiet():  # open_clip warns that no weights are loaded
        if files.is_transformers:
            model: nn.Module = open_clip.model.CLIP(**files.model_cfg)
            _check_transformers(files, model)
        else:
            name = f"local-dir:{files.directory}"
            model = open_clip.create_model(name, load_weights=False, device="meta")
    return model.eval()


def meta_clip_of_config(path: str | Path) -> tuple[nn.Module, int, int]:
    """The network without values, its image size and feature width, from the config alone: no weights need be there."""
    import open_clip

    directory = require_directory(path, "the CLIP directory")
    is_open_clip = (directory / OPEN_CLIP).is_file()
    config = (
        _read_open_clip_config(directory / OPEN_CLIP)
        if is_open_clip
        else _read_transformers_config(directory)
    )
    with torch.device("meta"), quiet():
        model = open_clip.model.CLIP(**config).eval().requires_grad_(False)
    return model, config["vision_cfg"]["image_size"], config["embed_dim"]


def clip_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a CLIP directory, or of an engine's copy of it without the weights."""
    directory = Path(path)
    if not (directory / OPEN_CLIP).is_file():
        text = _read_transformers_config(directory)["text_cfg"]
        return _TransformersTokenizer(directory, text["context_length"], text["vocab_size"])
    import open_clip

    return open_clip.get_tokenizer(f"local-dir:{directory}")


class _TransformersTokenizer:
    def __init__(self, directory: Path, length: int, vocabulary: int) -> None:
        from transformers import CLIPTokenizer

        self._tokenizer = CLIPTokenizer.from_pretrained(directory, local_files_only=True)
        self._length = length
        if (size := len(self._tokenizer)) > vocabulary:
            raise UserError(
                f"{directory}: the tokenizer has {size} tokens, {TRANSFORMERS}'s vocab_size is {vocabulary}; "
                "take both from one model"
            )

    def __call__(self, texts: Sequence[str], /) -> Tensor:
        # padded with 0, as open_clip does: the end token, transformers' padding, then stands in each row once
        rows = self._tokenizer(list(texts), truncation=True, max_length=self._length).input_ids
        return torch.tensor([[*row, *[0] * (self._length - len(row))] for row in rows], dtype=torch.int64)


# --- open_clip's layout ---


def _find_open_clip(directory: Path) -> ClipFiles:
    weights = directory / OPEN_CLIP_WEIGHTS
    if not weights.is_file():
        pickled = next(iter(sorted(directory.glob("*.bin"))), None)
        hint = f"; convert {pickled.name} once: {conversion(pickled, weights)}" if pickled else ""
        raise UserError(f"{directory} has {OPEN_CLIP}, but no {weights.name}{hint}")
    return ClipFiles(directory, _read_open_clip_config(directory / OPEN_CLIP), [weights], False)


def _load_open_clip(files: ClipFiles) -> nn.Module:
    import open_clip  # here, because it takes seconds and most of ubgen does without

    (weights,) = files.weights
    try:
        name = f"local-dir:{files.directory}"
        model = open_clip.create_model(name, require_pretrained=True, weights_only=True)
    except Exception as error:  # open_clip raises many kinds for one reason: config and weights disagree
        raise UserError(f"{weights}: does not fit {OPEN_CLIP}: {_one_line(error)}") from None
    _require_same_tables(weights, model)
    return model


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2])[:300]


def _require_same_tables(path: Path, model: nn.Module) -> None:
    """UserError for tables that open_clip would silently stretch to another image size or text length."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name, (_, shape) in read_header(path).items():
        if name in expected and shape != expected[name] and math.prod(shape) != math.prod(expected[name]):
            raise UserError(f"{path}: {name!r} has the shape {shape}, {OPEN_CLIP} needs {expected[name]}")


def _looks_like_openai(config: Mapping[str, Any], model: nn.Module) -> bool:
    """OpenAI's sizes, and values that were rounded to float16 once, as OpenAI released them."""
    vision = config["vision_cfg"]
    sizes = (config["embed_dim"], vision.get("width"), vision.get("layers"), vision.get("patch_size"))
    weight = model.get_parameter("text_projection").detach().float()
    return sizes in _OPENAI and bool((weight == weight.half().float()).all())


def _read_open_clip_config(path: Path) -> dict[str, Any]:
    """The config's `model_cfg`. UserError when it would need a download or another preprocessing."""
    config = read_json_object(path)
    try:
        model, seen = config["model_cfg"], config.get("preprocess_cfg", {})
        image_size, text, dim = model["vision_cfg"]["image_size"], model["text_cfg"], model["embed_dim"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not an open_clip config ({type(error).__name__}: {error})") from None
    if not isinstance(image_size, int) or not isinstance(dim, int):
        raise UserError(f"{path}: image_size and embed_dim must be whole numbers")
    if "hf_model_name" in text:
        raise UserError(f"{path}: open_clip's own text tower is needed, this one would be downloaded")
    if "hf_tokenizer_name" in text and not (path.parent / "tokenizer.json").is_file():
        raise UserError(
            f"{path}: names a tokenizer, so tokenizer.json must lie beside it; it would be downloaded"
        )
    supported: dict[str, list[Any]] = {
        "mean": [list(CLIP_MEAN)],
        "std": [list(CLIP_STD)],
        "interpolation": ["bicubic"],
        "mode": ["RGB"],
        "size": [image_size, [image_size, image_size]],
        "resize_mode": ["shortest", "longest", "squash"],  # one and the same for square images
    }
    for key, values in supported.items():
        if (given := seen.get(key, values[0])) not in values:
            raise UserError(f"{path}: preprocess_cfg.{key} is {given!r}; only {values[0]!r} is supported")
    return model


# --- transformers' layout ---


def _find_transformers(directory: Path) -> ClipFiles:
    config = _read_transformers_config(directory)
    _require_clip_preprocessing(directory / "preprocessor_config.json", config["vision_cfg"]["image_size"])
    if not (directory / "tokenizer.json").is_file():
        for name in ("vocab.json", "merges.txt"):
            if not (directory / name).is_file():
                raise UserError(
                    f"{directory / name}: no such file; expected tokenizer.json, or vocab.json and merges.txt"
                )
        require_real_file(directory / "merges.txt")
    return ClipFiles(directory, config, weight_files(directory, "CLIP"), True)


def _read_transformers_config(directory: Path) -> dict[str, Any]:
    """config.json in open_clip's words. UserError where it describes no CLIP, or one that open_clip cannot build."""
    path = directory / TRANSFORMERS
    values = read_json_object(path)
    if values.get("model_type") != "clip":
        raise UserError(
            f"{path}: model_type is {values.get('model_type')!r}; expected 'clip', both towers in one directory"
        )
    from transformers import CLIPConfig  # knows the defaults of what the file leaves out

    try:
        config = CLIPConfig.from_dict(values)
    except Exception as error:
        raise UserError(f"{path}: not a CLIP config ({first_line(error)})") from None
    vision, text = config.vision_config, config.text_config
    if not isinstance(vision.image_size, int) or not isinstance(vision.patch_size, int):
        raise UserError(f"{path}: image_size and patch_size must be whole numbers")
    if vision.hidden_act != text.hidden_act or vision.hidden_act not in ("quick_gelu", "gelu"):
        raise UserError(
            f"{path}: hidden_act must be 'quick_gelu' or 'gelu', the same in both towers; "
            f"it is {vision.hidden_act!r} and {text.hidden_act!r}"
        )
    # 2 stands for "the largest id of the row": configs from before it was corrected
    largest = text.eos_token_id in (2, text.vocab_size - 1)
    return {
        "embed_dim": config.projection_dim,
        "quick_gelu": vision.hidden_act == "quick_gelu",
        "vision_cfg": {
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "head_width": vision.hidden_size // vision.num_attention_heads,
            **_tower(vision),
        },
        "text_cfg": {
            "context_length": text.max_position_embeddings,
            "vocab_size": text.vocab_size,
            "heads": text.num_attention_heads,
            **_tower(text),
            **({} if largest else {"pool_type": "eos", "eos_id": text.eos_token_id}),
        },
    }


def _tower(config: Any) -> dict[str, Any]:
    return {
        "width": config.hidden_size,
        "layers": config.num_hidden_layers,
        "mlp_ratio": config.intermediate_size / config.hidden_size,
        "norm_kwargs": {"eps": config.layer_norm_eps},
    }


def _require_clip_preprocessing(path: Path, image_size: int) -> None:
    """UserError for a preprocessor_config.json, where there is one, that is not CLIP's own."""
    if not path.is_file():
        return
    seen = read_json_object(path)
    supported: dict[str, list[Any]] = {
        "image_mean": [list(CLIP_MEAN)],
        "image_std": [list(CLIP_STD)],
        "resample": [3],  # bicubic
        "size": [image_size, {"shortest_edge": image_size}, {"height": image_size, "width": image_size}],
    }
    for key, values in supported.items():
        if (given := seen.get(key, values[0])) not in values:
            raise UserError(f"{path}: {key} is {given!r}; only {values[0]!r} is supported")


_NAMES = {
    "logit_scale": "logit_scale",
    "visual.proj": "visual_projection.weight",
    "text_projection": "text_projection.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "visual.ln_pre": "vision_model.pre_layrnorm",
    "visual.ln_post": "vision_model.post_layernorm",
    "ln_final": "text_model.final_layer_norm",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
"""open_clip's name of a tensor, or of the module that holds it -> transformers'."""
_TRANSPOSED = ("visual.proj", "text_projection")
_LAYER = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)")
_UNUSED = re.compile(r"embeddings\.position_ids$")  # a table of 0, 1, 2, ... in older files


def _sources(name: str) -> list[str]:
    """The tensors in transformers' file that make up open_clip's tensor `name`, in their order."""
    if name in _NAMES:
        return [_NAMES[name]]
    prefix, inner = "", name
    if layer := _LAYER.fullmatch(name):
        tower = "vision_model" if layer[1] else "text_model"
        prefix, inner = f"{tower}.encoder.layers.{layer[2]}.", layer[3]
    if inner.startswith("attn.in_proj_"):
        kind = inner.removeprefix("attn.in_proj_")
        return [f"{prefix}self_attn.{part}_proj.{kind}" for part in "qkv"]
    module, _, kind = inner.rpartition(".")
    return [f"{prefix}{_NAMES[module]}.{kind}"]


def _expected(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The tensors that transformers' file must hold for `model`, with their shapes."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, tensor in model.state_dict().items():
        parts = _sources(name)
        shape = tuple(reversed(tensor.shape)) if name in _TRANSPOSED else tuple(tensor.shape)
        shapes |= dict.fromkeys(parts, (shape[0] // 3, *shape[1:]) if len(parts) == 3 else shape)
    return shapes


def _check_transformers(files: ClipFiles, model: nn.Module) -> None:
    """UserError when the headers of the weights do not fit; pickles have none."""
    if any(file.suffix != ".safetensors" for file in files.weights):
        return
    found = {name: info.shape for file in files.weights for name, info in read_header(file).items()}
    _require_fitting(files, found, model)


def _require_fitting(files: ClipFiles, found: Mapping[str, tuple[int, ...]], model: nn.Module) -> None:
    expected, where = _expected(model), files.weights[0] if len(files.weights) == 1 else files.directory
    for name, shape in expected.items():
        if name not in found:
            raise UserError(f"{where}: tensor {name!r} is missing")
        if found[name] != shape:
            raise UserError(f"{where}: {name!r} has the shape {found[name]}, {TRANSFORMERS} needs {shape}")
    if unknown := sorted(name for name in found if name not in expected and not _UNUSED.search(name)):
        raise UserError(f"{where}: unexpected tensor {unknown[0]!r}, CLIP has none of that name")


def _load_transformers(files: ClipFiles) -> nn.Module:
    import open_clip

    model: nn.Module = open_clip.model.CLIP(**files.model_cfg)
    given = {name: tensor for file in files.weights for name, tensor in read_tensors(file)}
    _require_fitting(files, {name: tuple(tensor.shape) for name, tensor in given.items()}, model)
    for name, target in model.state_dict().items():
        parts = [given.pop(part) for part in _sources(name)]
        value = torch.cat(parts) if len(parts) > 1 else parts[0]
        target.copy_(value.T if name in _TRANSPOSED else value)
    return model.eval()
