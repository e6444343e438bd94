"""Stable Diffusion 1.x from a local directory in diffusers layout."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ubgen.core.errors import UserError


@dataclass(frozen=True)
class StableDiffusion:
    """The parts, frozen and in eval mode. `tokenizer` is None if the directory has none."""

    unet: Any
    vae: Any
    text_encoder: Any
    tokenizer: Any
    scheduler: Any
    path: Path

    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of one image's latents."""
        config = self.unet.config
        return config.in_channels, config.sample_size, config.sample_size


def load_stable_diffusion(
    path: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> StableDiffusion:
    """Load unet/, vae/, text_encoder/, scheduler/ and tokenizer/ (safetensors only, nothing is downloaded).

    Raises UserError naming the missing directory, file or tensor.
    """
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel

    root = _root(path)
    parts = {
        "unet": _load(UNet2DConditionModel, root / "unet", "diffusion_pytorch_model", torch_dtype=dtype),
        "vae": _load(AutoencoderKL, root / "vae", "diffusion_pytorch_model", torch_dtype=dtype),
        "text_encoder": _load(CLIPTextModel, root / "text_encoder", "model", dtype=dtype),
    }
    frozen = {name: part.to(device).eval().requires_grad_(False) for name, part in parts.items()}
    return StableDiffusion(
        **frozen, tokenizer=_load_tokenizer(root), scheduler=_load_scheduler(root), path=root
    )


@torch.no_grad()
def encode_prompts(sd: StableDiffusion, prompts: Sequence[str]) -> Tensor:
    """(B,S,D) last hidden states of the text encoder, in its dtype; "" is the unconditional prompt.

    Padded or cut to the tokenizer's length; no attention mask, as SD 1.x was trained.
    """
    if sd.tokenizer is None:
        raise UserError(f"{sd.path / 'tokenizer'}: no such directory; expected the CLIP tokenizer's files")
    length = min(sd.tokenizer.model_max_length, sd.text_encoder.config.max_position_embeddings)
    tokens = sd.tokenizer(
        list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    )
    return sd.text_encoder(tokens.input_ids.to(sd.text_encoder.device)).last_hidden_state


def with_sampler(scheduler: Any, name: str) -> Any:
    """The diffusers scheduler `name` ("pndm", "ddim", "ddpm") with the noise schedule of `scheduler`."""
    import diffusers

    from ubgen.diffusion.schedule import CLASSES

    kinds = {short: kind for kind, short in CLASSES.items()}
    if name not in kinds:
        raise UserError(f"sampler: {name!r} is not one of {', '.join(sorted(kinds))}")
    return getattr(diffusers, kinds[name]).from_config(scheduler.config, clip_sample=False)


def _root(path: str | Path) -> Path:
    from ubgen.core.config import resolve_path

    root = resolve_path(path)
    for name in ("unet", "vae", "text_encoder", "scheduler"):
        if not (root / name).is_dir():
            raise UserError(
                f"{root / name}: no such directory; expected Stable Diffusion 1.x in diffusers layout"
            )
    return root


def _load(cls: Any, directory: Path, stem: str, **dtype: torch.dtype) -> Any:
    """One network from its directory; the file may be the fp16 variant."""
    variant = None
    if not (directory / f"{stem}.safetensors").is_file():
        if not (directory / f"{stem}.fp16.safetensors").is_file():
            raise UserError(f"{directory / stem}.safetensors: no such file")
        variant = "fp16"
    if not (directory / "config.json").is_file():
        raise UserError(f"{directory / 'config.json'}: no such file")
    try:
        with _quiet():
            model, report = cls.from_pretrained(
                directory,
                variant=variant,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
                **dtype,
            )
    except Exception as error:  # the two libraries raise many types for a damaged or mismatched file
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{directory}: cannot load {cls.__name__}: {reason}") from error
    if report["missing_keys"]:
        raise UserError(f"{directory / stem}.safetensors: tensor {min(report['missing_keys'])!r} is missing")
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bar for a load that takes a moment."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _load_tokenizer(root: Path) -> Any:
    from transformers import CLIPTokenizer

    if not (root / "tokenizer").is_dir():
        return None
    return CLIPTokenizer.from_pretrained(root / "tokenizer", local_files_only=True)


def _load_scheduler(root: Path) -> Any:
    """The scheduler that the directory names where this package has its sampler, otherwise PNDM with its betas."""
    import json

    import diffusers

    from ubgen.diffusion.schedule import CLASSES

    file = root / "scheduler" / "scheduler_config.json"
    if not file.is_file():
        raise UserError(f"{file}: no such file")
    config = json.loads(file.read_text(encoding="utf-8"))
    kind = config.get("_class_name", "PNDMScheduler")
    return getattr(diffusers, kind if kind in CLASSES else "PNDMScheduler").from_config(config)
