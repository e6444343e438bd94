"""Stable Diffusion parts, samplers as plain functions, differentiable rollouts, LoRA."""

from ubgen.diffusion.lora import (
    add_lora,
    load_lora,
    lora_parameters,
    merge_lora,
    restore_lora,
    save_lora,
    without_lora,
)
from ubgen.diffusion.lora_files import LORA_FILE, find_lora, read_lora
from ubgen.diffusion.noise import hashed_generator, initial_noise
from ubgen.diffusion.sampling import decode, rollout, sample, sample_guided
from ubgen.diffusion.schedule import Call, draw_training_steps, schedule, training_steps
from ubgen.diffusion.stable_diffusion import (
    StableDiffusion,
    check_stable_diffusion,
    encode_prompts,
    load_scheduler,
    load_stable_diffusion,
    stable_diffusion_files,
    tokenize,
    with_sampler,
)

__all__ = [
    "LORA_FILE",
    "Call",
    "StableDiffusion",
    "add_lora",
    "check_stable_diffusion",
    "decode",
    "draw_training_steps",
    "encode_prompts",
    "find_lora",
    "hashed_generator",
    "initial_noise",
    "load_lora",
    "load_scheduler",
    "load_stable_diffusion",
    "lora_parameters",
    "merge_lora",
    "read_lora",
    "restore_lora",
    "rollout",
    "sample",
    "sample_guided",
    "save_lora",
    "schedule",
    "stable_diffusion_files",
    "tokenize",
    "training_steps",
    "with_sampler",
    "without_lora",
]
