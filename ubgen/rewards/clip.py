"""CLIP through open_clip: image features that carry gradient, text features that do not."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ubgen.core.config import require_directory
from ubgen.core.errors import UserError, warn
from ubgen.core.weights import read_header, read_json_object, require_finite
from ubgen.rewards.preprocess import CLIP_MEAN, CLIP_STD, clip_preprocess

CONFIG = "open_clip_config.json"
WEIGHTS = "open_clip_model.safetensors"
_OPENAI = {(512, 768, 12, 32), (512, 768, 12, 16), (768, 1024, 24, 14)}
"""Feature width; width, layers and patch size of the image tower: ViT-B/32, ViT-B/16, ViT-L/14."""


class Clip:
    """A frozen CLIP: `model` is open_clip's module, `image_size` its side in pixels, `dim` the feature width."""

    def __init__(self, model: nn.Module, tokenizer: Any, image_size: int, dim: int) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.image_size = image_size
        self.dim = dim

    @classmethod
    def load(
        cls, path: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> "Clip":
        """Read a directory with open_clip_config.json and open_clip_model.safetensors; nothing is downloaded.

        The activation follows the config's `quick_gelu`: OpenAI's weights need `"quick_gelu": true` there, and
        nothing in the weights says so; a warning says when they look like those. UserError when a file is missing or
        damaged, when the weights are not finite or not those of the config, and for another preprocessing than CLIP's.
        """
        import open_clip  # here, because it takes seconds and most of ubgen does without

        directory = require_directory(path, "the CLIP directory", CONFIG, WEIGHTS)
        config = check_clip(directory)
        name = f"local-dir:{directory}"
        try:
            model = open_clip.create_model(name, require_pretrained=True, weights_only=True)
        except Exception as error:  # open_clip raises many kinds for one reason: config and weights disagree
            raise UserError(f"{directory / WEIGHTS}: does not fit {CONFIG}: {_one_line(error)}") from None
        _check_shapes(directory / WEIGHTS, model)
        require_finite(model.named_parameters(), directory / WEIGHTS)
        if not config.get("quick_gelu") and _looks_like_openai(config, model):
            warn(
                f"{directory / CONFIG} does not set quick_gelu, but the weights look like OpenAI's, which need it: "
                'add "quick_gelu": true to model_cfg, or all features are a little wrong'
            )
        model = model.to(device=device, dtype=dtype).eval().requires_grad_(False)
        size, dim = config["vision_cfg"]["image_size"], config["embed_dim"]
        return cls(model, open_clip.get_tokenizer(name), size, dim)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def encode_image(self, images_B3HW: Tensor) -> Tensor:
        """RGB images (B, 3, H, W) in [0, 1], any size -> un-normalised features (B, dim). Differentiable."""
        return self.encode_pixels(clip_preprocess(images_B3HW, self.image_size))

    def encode_pixels(self, pixels_B3HW: Tensor) -> Tensor:
        """Normalised pixels (B, 3, image_size, image_size) -> features (B, dim), not L2-normalised."""
        return self.model.encode_image(pixels_B3HW.to(self.dtype))  # type: ignore[operator]

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str], batch: int = 256) -> Tensor:
        """N texts -> features (N, dim), not L2-normalised, without gradient; `batch` texts at a time."""
        rows = []
        for first in range(0, len(texts), batch):
            tokens = self.tokenizer(list(texts[first : first + batch])).to(self.device)
            rows.append(self.model.encode_text(tokens))  # type: ignore[operator]
        return torch.cat(rows) if rows else torch.empty(0, self.dim, dtype=self.dtype, device=self.device)


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2])[:300]


def check_clip(directory: Path) -> dict[str, Any]:
    """The config's `model_cfg`, once the directory's files are found whole; milliseconds. UserError as for `Clip.load`,
    except for what only the tensors' values tell."""
    config = _read_config(require_directory(directory, "the CLIP directory", CONFIG, WEIGHTS) / CONFIG)
    read_header(directory / WEIGHTS)
    for file in sorted(directory.glob("*.json")):
        read_json_object(file)
    return config


def _check_shapes(path: Path, model: nn.Module) -> None:
    """UserError for tables that open_clip would silently stretch to another image size or text length."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name, (_, shape) in read_header(path).items():
        if name in expected and shape != expected[name] and math.prod(shape) != math.prod(expected[name]):
            raise UserError(f"{path}: {name!r} has the shape {shape}, {CONFIG} needs {expected[name]}")


def _looks_like_openai(config: dict[str, Any], model: nn.Module) -> bool:
    """OpenAI's sizes, and values that were rounded to float16 once, as OpenAI released them."""
    vision = config["vision_cfg"]
    sizes = (config["embed_dim"], vision.get("width"), vision.get("layers"), vision.get("patch_size"))
    weight = model.get_parameter("text_projection").detach().float()
    return sizes in _OPENAI and bool((weight == weight.half().float()).all())


def _read_config(path: Path) -> dict[str, Any]:
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
