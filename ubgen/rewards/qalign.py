"""Q-Align ("one-align"): the differentiable image quality score of Eq. 10-11, in plain PyTorch."""

import json
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ubgen.core.config import resolve_path
from ubgen.core.errors import UserError
from ubgen.rewards.preprocess import qalign_preprocess
from ubgen.rewards.qalign_config import QAlignConfig
from ubgen.rewards.qalign_model import MultimodalDecoder, offload
from ubgen.rewards.qalign_weights import load_into, read_config


class QAlign(nn.Module):
    """The expected level in "The quality of the image is ...", from 1 (bad) to 5 (excellent).

    One forward pass, nothing is generated: the logits of the five level words after the fixed prompt, softmax
    over the five in float32, weighted sum. `config` is the config.json as a dictionary.
    """

    prompt_ids: Tensor
    level_ids: Tensor
    level_weights: Tensor

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config = config
        self.sizes = QAlignConfig.from_dict(config)
        self.model = MultimodalDecoder(self.sizes)
        self.lm_head = nn.Linear(self.sizes.hidden_size, self.sizes.vocab_size, bias=False)
        scoring = self.sizes.scoring
        self._constant("prompt_ids", torch.tensor([scoring.prompt_ids], device="cpu"))
        self._constant("level_ids", torch.tensor(scoring.level_token_ids, device="cpu"))
        self._constant(
            "level_weights", torch.tensor(scoring.level_weights, dtype=torch.float32, device="cpu")
        )
        self.prompt_place = scoring.prompt_ids.index(scoring.image_token_index)

    def _constant(self, name: str, value: Tensor) -> None:
        self.register_buffer(name, value, persistent=False)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "QAlign":
        """A fresh, randomly initialised network in float32 on the CPU, every parameter trainable.

        `config` has the fields of the public checkpoint's config.json; an optional section `scoring` holds
        image_token_index, level_token_ids, level_weights and prompt_ids (ids with the marker once in it), for
        vocabularies other than LLaMA's. Draws from torch's global generator. UserError on a bad config.
        """
        model = cls(config)
        _initialise(model)
        return model

    @classmethod
    def load(
        cls,
        path: str | Path,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        *,
        offloaded: bool = False,
    ) -> "QAlign":
        """Read a directory with config.json and the weights, frozen and in eval mode.

        Weights: model.safetensors, safetensors shards with or without an index, or pickled *.bin shards (read
        with weights_only). Needs the memory of the weights in `dtype` and no more. UserError when the
        directory or a file is missing, or when a tensor is missing, unknown or of the wrong shape.

        `offloaded`: the layers stay in the host's memory; each is copied to `device` whenever its turn comes, and no
        activation is kept. Slower by the copies (15 GB a pass at full size), in the memory of one layer.
        """
        directory = resolve_path(path)
        with torch.device("meta"):
            model = cls(read_config(directory))
        load_into(model, directory, dtype, "cpu" if offloaded else device)
        model = model.eval().requires_grad_(False)
        if not offloaded:
            return model.to(device)
        parts = model.model
        stacks = (parts.vision_model.encoder.layers, parts.visual_abstractor.encoder.layers, parts.layers)
        offload(model, [layer for stack in stacks for layer in stack], torch.device(device))
        return model

    def save(self, directory: str | Path) -> None:
        """Write config.json and model.safetensors, which `load` reads."""
        out = Path(directory)
        out.mkdir(parents=True, exist_ok=True)
        (out / "config.json").write_text(json.dumps(self.config, indent=2) + "\n", encoding="utf-8")
        save_file(
            {name: t.contiguous().cpu() for name, t in self.state_dict().items()}, out / "model.safetensors"
        )

    @property
    def image_size(self) -> int:
        """Side of the square that the vision tower takes, in pixels."""
        return self.sizes.vision.image_size

    @property
    def dtype(self) -> torch.dtype:
        return self.lm_head.weight.dtype

    def score(self, images_B3HW: Tensor, *, checkpoint: bool = False) -> Tensor:
        """Quality (B,) float32 in [1, 5] of images (B, 3, H, W), RGB in [0, 1], any size. Differentiable.

        Squares are resized to the network's size as in training (values are not clamped). Other shapes are
        padded to a square with the mean colour first, as Q-Align's own image path does. `checkpoint`
        recomputes each layer in the backward pass instead of keeping its activations.
        """
        square = images_B3HW.shape[-2] == images_B3HW.shape[-1]
        pixels = qalign_preprocess(images_B3HW, self.image_size, fit="squash" if square else "pad")
        return self.score_pixels(pixels, checkpoint=checkpoint)

    def score_pixels(
        self, pixel_values: Tensor, input_ids: Tensor | None = None, *, checkpoint: bool = False
    ) -> Tensor:
        """Quality (B,) float32 in [1, 5] of normalised pixels (B, 3, image_size, image_size).

        `input_ids`: prompt ids (B, n) or (n,), with the image's marker once in each row, at the same place in
        all rows; the standard prompt when None. ValueError on another pixel shape or a misplaced marker.
        """
        logits = self.level_logits(pixel_values, input_ids, checkpoint=checkpoint)
        # no matrix product: autocast would round the score to half precision
        return (torch.softmax(logits.float(), dim=-1) * self.level_weights.float()).sum(dim=-1)

    forward = score_pixels

    def level_logits(
        self, pixel_values: Tensor, input_ids: Tensor | None = None, *, checkpoint: bool = False
    ) -> Tensor:
        """The (B, 5) logits of the levels (excellent .. bad) at the last position; see `score_pixels`."""
        hidden = self.hidden_states(pixel_values, input_ids, checkpoint=checkpoint)
        rows = self.lm_head.weight.index_select(0, self.level_ids)  # 5 of the vocabulary's rows are enough
        return self.model.norm(hidden[:, -1]) @ rows.T

    def hidden_states(
        self, pixel_values: Tensor, input_ids: Tensor | None = None, *, checkpoint: bool = False
    ) -> Tensor:
        """Output (B, S, D) of the last decoder layer, before the final norm; see `score_pixels`."""
        size = self.image_size
        if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != (3, size, size):
            raise ValueError(f"pixel_values must be (B, 3, {size}, {size}), not {tuple(pixel_values.shape)}")
        ids, place = self._prompt(input_ids)
        before, after = ids[:, :place], ids[:, place + 1 :]
        return self.model(pixel_values.to(self.dtype), before, after, checkpoint)

    def _prompt(self, input_ids: Tensor | None) -> tuple[Tensor, int]:
        if input_ids is not None:
            ids = input_ids if input_ids.ndim == 2 else input_ids[None]
            return ids, _marker_place(ids, self.sizes.scoring.image_token_index)
        if max(self.sizes.scoring.prompt_ids) >= self.sizes.vocab_size:
            size = self.sizes.vocab_size
            raise UserError(
                f"Q-Align config: the prompt needs a larger vocabulary than {size}; set scoring.prompt_ids"
            )
        return self.prompt_ids, self.prompt_place


def _marker_place(ids: Tensor, marker: int) -> int:
    """Where the image goes: one place for all rows, so that shapes depend on the batch alone."""
    is_marker = ids.cpu() == marker
    place = int(is_marker[0].long().argmax())
    if not bool((is_marker.sum(1) == 1).all()) or not bool(is_marker[:, place].all()):
        raise ValueError(
            f"input_ids must hold the image marker {marker} once per row, at one place in all rows"
        )
    return place


def _initialise(model: QAlign) -> None:
    """Xavier weights, zero biases, small normal values for everything that is looked up as a token."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(module.weight.flatten(1))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
    vision, abstractor = model.model.vision_model.embeddings, model.model.visual_abstractor
    for token in (vision.cls_token, vision.position_embedding, abstractor.query_embeds, abstractor.vit_eos):
        nn.init.normal_(cast(Tensor, token), std=0.02)
