"""The networks that are measured, as configurations: Stable Diffusion 1.5 and its scorers, and a tiny set for a CPU.

Published configurations, written out so that nothing is downloaded; weights are random.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Config = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """`unet`, `vae`: diffusers; `clip`: open_clip; `qalign`: the public checkpoint's config.json."""

    unet: Config
    vae: Config
    clip: Config
    qalign: Config
    tokens: int  # of a prompt
    batches: tuple[int, ...]  # images in one denoising call, the most important first
    scored: tuple[int, ...]  # images in one call of the decoder and the scorers
    steps: int  # of the sampling loop
    lora_rank: int
    train_batch: int

    @property
    def latent(self) -> tuple[int, int, int]:
        """(C, h, w) of one image."""
        return self.unet["in_channels"], self.unet["sample_size"], self.unet["sample_size"]

    @property
    def image(self) -> int:
        """Side of an image in pixels."""
        return self.unet["sample_size"] * 2 ** (len(self.vae["block_out_channels"]) - 1)

    @property
    def width(self) -> int:
        """Of the prompt's embeddings."""
        return self.unet["cross_attention_dim"]


FULL = Sizes(
    unet={
        "sample_size": 64,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": [320, 640, 1280, 1280],
        "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
        "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
        "layers_per_block": 2,
        "cross_attention_dim": 768,
        "attention_head_dim": 8,  # heads, in spite of its name: widths 40, 80 and 160
        "norm_num_groups": 32,
        "norm_eps": 1e-5,
    },
    vae={
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 4,
        "sample_size": 512,
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "scaling_factor": 0.18215,
    },
    clip={
        "embed_dim": 768,
        "quick_gelu": True,
        "vision_cfg": {"image_size": 224, "layers": 24, "width": 1024, "patch_size": 14},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 768, "heads": 12, "layers": 12},
    },
    qalign=json.loads((Path(__file__).parents[1] / "qalign-7b.json").read_text(encoding="utf-8")),
    tokens=77,
    batches=(32, 8, 1),
    scored=(32, 8),
    steps=50,
    lora_rank=128,
    train_batch=4,
)

TINY = Sizes(
    unet=FULL.unet
    | {
        "sample_size": 8,
        "block_out_channels": [16, 32],
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        "layers_per_block": 1,
        "cross_attention_dim": 24,
        "attention_head_dim": 2,
        "norm_num_groups": 8,
    },
    vae=FULL.vae
    | {
        "sample_size": 16,
        "block_out_channels": [8, 8],
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "layers_per_block": 1,
        "norm_num_groups": 4,
    },
    clip={
        "embed_dim": 16,
        "quick_gelu": True,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 8, "patch_size": 16},
        "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1},
    },
    qalign=FULL.qalign
    | {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "visual_config": {
            "visual_model": {
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 1,
                "num_attention_heads": 4,
                "image_size": 56,
                "patch_size": 14,
            },
            "visual_abstractor": {
                "num_learnable_queries": 4,
                "hidden_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 4,
                "intermediate_size": 24,
                "grid_size": 4,
            },
        },
        "scoring": {"prompt_ids": [1, 5, 7, -200, 9, 11], "level_token_ids": [3, 4, 5, 6, 7]},
    },
    tokens=6,
    batches=(2, 1),
    scored=(2,),
    steps=3,
    lora_rank=2,
    train_batch=2,
)
