"""CLIP through open_clip: image features that carry gradient, text features that do not."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ubgen.rewards.clip_files import build_clip, clip_tokenizer, find_clip
from ubgen.rewards.preprocess import clip_preprocess


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
        """Read an open_clip directory, or a transformers CLIP directory; nothing is downloaded.

        open_clip: open_clip_config.json and open_clip_model.safetensors. transformers: config.json, the weights and the
        tokenizer, as in `openai/clip-vit-large-patch14`. The activation follows the config (`quick_gelu`, or
        `hidden_act`): OpenAI's weights need quick-GELU, and nothing in the weights says so; a warning says when they
        look like those. UserError when a file is missing or damaged, when the weights are not finite or not those of
        the config, and for another preprocessing than CLIP's.
        """
        files = find_clip(path)
        model = build_clip(files).to(device=device, dtype=dtype).eval().requires_grad_(False)
        size, dim = files.model_cfg["vision_cfg"]["image_size"], files.model_cfg["embed_dim"]
        return cls(model, clip_tokenizer(files.directory), size, dim)

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
