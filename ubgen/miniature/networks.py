"""Architectures of the miniature family: Stable Diffusion 1.x, CLIP and Q-Align, scaled down to 64x64 images."""

import itertools
import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ubgen.miniature.quality import LEVELS
from ubgen.miniature.shapes import CLASSES
from ubgen.miniature.world import COLOURS, SCENES, TEXTURES

IMAGE_SIZE = 64
PROMPT_LENGTH = 16
WORDS: tuple[str, ...] = ("photo", "of", "a", "on", "in", *CLASSES, *SCENES, *TEXTURES, *COLOURS)

# The first convolution of SD1.x at a sixth of its width; two resolutions instead of four, since 64x64 images
# leave 8x8 latents.
UNET_CONFIG = {
    "sample_size": 8,
    "in_channels": 8,
    "out_channels": 8,
    "block_out_channels": (64, 128),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 96,
    "attention_head_dim": 4,
    "norm_num_groups": 16,
}
VAE_CONFIG = {
    "sample_size": IMAGE_SIZE,
    "latent_channels": 8,
    "block_out_channels": (16, 16, 48, 96),
    "layers_per_block": 1,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "norm_num_groups": 8,
}
SCHEDULER_CONFIG = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "skip_prk_steps": True,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
CLIP_CONFIG = {
    "model_cfg": {
        "embed_dim": 96,
        "quick_gelu": True,
        "vision_cfg": {"image_size": IMAGE_SIZE, "layers": [1, 1, 1, 1], "width": 16, "head_width": 32},
        "text_cfg": {
            "context_length": PROMPT_LENGTH,
            "vocab_size": 0,  # filled in from the tokenizer
            "width": 96,
            "heads": 3,
            "layers": 2,
            "hf_tokenizer_name": "",  # filled in with the directory itself when it is loaded
        },
    },
    "preprocess_cfg": {
        "mean": [0.48145466, 0.4578275, 0.40821073],
        "std": [0.26862954, 0.26130258, 0.27577711],
        "interpolation": "bicubic",
        "resize_mode": "squash",
    },
}


def vae() -> AutoencoderKL:
    return AutoencoderKL(**VAE_CONFIG)


def unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(**UNET_CONFIG)


def scheduler() -> PNDMScheduler:
    return PNDMScheduler(**SCHEDULER_CONFIG)


def text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=PROMPT_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def _merges(word: str) -> list[tuple[str, str]]:
    """Byte-pair merges that join a word's letters, left to right, into one token."""
    parts = [*word[:-1], word[-1] + "</w>"]
    merges = []
    while len(parts) > 1:
        merges.append((parts[0], parts[1]))
        parts = [parts[0] + parts[1], *parts[2:]]
    return merges


def tokenizer(directory: Path) -> CLIPTokenizer:
    """CLIP's byte-pair tokenizer with one token per word of the world; other words fall back to letters."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,-'\"!?()/:;&+_"
    merges = list(dict.fromkeys(pair for word in WORDS for pair in _merges(word)))
    tokens = [*letters, *(f"{c}</w>" for c in letters), *(a + b for a, b in merges)]
    tokens = list(dict.fromkeys([*tokens, "<|startoftext|>", "<|endoftext|>"]))
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}))
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges)]
    (directory / "merges.txt").write_text("\n".join(lines) + "\n")
    made = CLIPTokenizer(
        vocab=str(directory / "vocab.json"),
        merges=str(directory / "merges.txt"),
        model_max_length=PROMPT_LENGTH,
        pad_token="<|endoftext|>",
    )
    made.save_pretrained(directory)
    return made


def qalign_config() -> dict:
    """Q-Align at a size for 64x64 images: same fields, same tensor names, a vocabulary of a few words."""
    prompt_words = 12  # ids 1 … 12 stand for the words of the question; 0 is the start token
    return {
        "model_type": "mplug_owl2",
        "vocab_size": 24,
        "hidden_size": 96,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": 64,
        "attention_bias": False,
        "tie_word_embeddings": False,
        "visual_config": {
            "visual_model": {
                "hidden_size": 96,
                "intermediate_size": 256,
                "num_hidden_layers": 3,
                "num_attention_heads": 4,
                "num_channels": 3,
                "image_size": IMAGE_SIZE,
                "patch_size": 8,
                "hidden_act": "quick_gelu",
                "layer_norm_eps": 1e-6,
            },
            "visual_abstractor": {
                "num_learnable_queries": 8,
                "hidden_size": 96,
                "encoder_hidden_size": 96,
                "num_hidden_layers": 1,
                "num_attention_heads": 4,
                "intermediate_size": 192,
                "layer_norm_eps": 1e-6,
                "grid_size": IMAGE_SIZE // 8,
            },
        },
        "scoring": {
            "image_token_index": -200,
            "prompt_ids": [0, *range(1, 7), -200, *range(7, prompt_words + 1)],
            "level_names": list(LEVELS),
            "level_token_ids": list(range(prompt_words + 1, prompt_words + 1 + len(LEVELS))),
            "level_weights": [5.0, 4.0, 3.0, 2.0, 1.0],
            "logits_position": -1,
        },
    }


class Oracle(nn.Module):
    """Judge of the miniature: class and background of a picture, trained on the fair world only."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 24, 48, 72, 96)
        blocks: list[nn.Module] = []
        for a, b in itertools.pairwise(widths):
            blocks += [
                nn.Conv2d(a, b, 3, padding=1, bias=False),
                nn.BatchNorm2d(b),
                nn.ReLU(),
                nn.MaxPool2d(2),
            ]
        self.trunk = nn.Sequential(*blocks, nn.Flatten(), nn.Linear(96 * 16, 160), nn.ReLU())
        self.label = nn.Linear(160, len(CLASSES))
        self.scene = nn.Linear(160, len(SCENES))
        self.texture = nn.Linear(160, len(TEXTURES))

    def forward(self, images_B3HW: Tensor) -> dict[str, Tensor]:
        """Images in [0, 1] -> logits by factor name."""
        hidden = self.trunk(torch.clamp(images_B3HW, 0, 1) * 2 - 1)
        return {"label": self.label(hidden), "scene": self.scene(hidden), "texture": self.texture(hidden)}
