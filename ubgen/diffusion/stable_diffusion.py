"""Stable Diffusion 1.x from a local directory in diffusers layout."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ubgen.core.errors import UserError
from ubgen.core.weights import (
    TensorInfo,
    conversion,
    read_header,
    read_json_object,
    require_finite,
    require_real_file,
)

_STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
_NOISE = (
    *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule"),
    *("trained_betas", "prediction_type", "rescale_betas_zero_snr"),
)
"""Keys of a scheduler's config that describe the noise which the UNet was trained on."""


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

    Raises UserError naming the directory, file or tensor that is missing, damaged, not finite, or does not fit the
    others.
    """
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel

    root = check_stable_diffusion(path)
    parts = {
        "unet": _load(UNet2DConditionModel, root / "unet", torch_dtype=dtype),
        "vae": _load(AutoencoderKL, root / "vae", torch_dtype=dtype),
        "text_encoder": _load(CLIPTextModel, root / "text_encoder", dtype=dtype),
    }
    frozen = {name: part.to(device).eval().requires_grad_(False) for name, part in parts.items()}
    return StableDiffusion(
        **frozen, tokenizer=_load_tokenizer(root), scheduler=load_scheduler(root / "scheduler"), path=root
    )


@torch.no_grad()
def encode_prompts(sd: StableDiffusion, prompts: Sequence[str]) -> Tensor:
    """(B,S,D) last hidden states of the text encoder, in its dtype; "" is the unconditional prompt.

    No attention mask, as SD 1.x was trained.
    """
    return sd.text_encoder(tokenize(sd, prompts).to(sd.text_encoder.device)).last_hidden_state


def tokenize(sd: StableDiffusion, prompts: Sequence[str]) -> Tensor:
    """(B,S) int64 ids, padded or cut to the tokenizer's length."""
    if sd.tokenizer is None:
        raise UserError(f"{sd.path / 'tokenizer'}: no such directory; expected the CLIP tokenizer's files")
    length = min(sd.tokenizer.model_max_length, sd.text_encoder.config.max_position_embeddings)
    tokens = sd.tokenizer(
        list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    )
    return tokens.input_ids


def with_sampler(scheduler: Any, name: str) -> Any:
    """The diffusers scheduler `name` ("pndm", "ddim", "ddpm") with the noise schedule of `scheduler`."""
    import diffusers

    from ubgen.diffusion.schedule import CLASSES

    kinds = {short: kind for kind, short in CLASSES.items()}
    if name not in kinds:
        raise UserError(f"sampler: {name!r} is not one of {', '.join(sorted(kinds))}")
    settings = {"clip_sample": False}
    if (
        name == "pndm" and "skip_prk_steps" not in scheduler.config
    ):  # of another class, which knows no such key
        settings["skip_prk_steps"] = True
    return getattr(diffusers, kinds[name]).from_config(scheduler.config, **settings)


def check_stable_diffusion(path: str | Path) -> Path:
    """The directory, once its files are found whole and its parts to fit each other.

    Reads configs, the tokenizer and the headers of weight files: milliseconds, before anything is loaded. UserError as
    for `load_stable_diffusion`, except for what only the tensors' values tell.
    """
    from ubgen.core.config import resolve_path

    root = resolve_path(path)
    for name in ("unet", "vae", "text_encoder", "scheduler"):
        if not (root / name).is_dir():
            raise UserError(
                f"{root / name}: no such directory; expected Stable Diffusion 1.x in diffusers layout"
            )
    configs = {name: read_json_object(root / name / "config.json") for name in _STEMS}
    _require_fitting(root, configs, {name: read_header(weight_file(root / name)[0]) for name in _STEMS})
    scheduler_config(root / "scheduler")
    if (root / "tokenizer").is_dir():
        check_tokenizer(root / "tokenizer")
    return root


def stable_diffusion_files(root: Path) -> list[Path]:
    """What `load_stable_diffusion` reads of a directory that `check_stable_diffusion` has found whole."""
    parts = [root / name for name in _STEMS]
    tokenizer = (root / "tokenizer").iterdir() if (root / "tokenizer").is_dir() else ()
    return [
        *(part / "config.json" for part in parts),
        *(weight_file(part)[0] for part in parts),
        root / "scheduler" / "scheduler_config.json",
        *(file for file in tokenizer if file.suffix in (".json", ".txt")),
    ]


def _require_fitting(root: Path, configs: dict[str, Any], tensors: dict[str, dict[str, TensorInfo]]) -> None:
    unet, vae, text = configs["unet"], configs["vae"], configs["text_encoder"]
    file = root / "unet" / "config.json"
    for key in ("addition_embed_type", "class_embed_type", "encoder_hid_dim_type", "time_cond_proj_dim"):
        if unet.get(key) is not None:
            raise UserError(
                f"{file}: {key} is {unet[key]!r}; only UNets like Stable Diffusion 1.x's are supported"
            )
    channels, out, latents = (
        unet.get("in_channels", 4),
        unet.get("out_channels", 4),
        vae.get("latent_channels", 4),
    )
    if channels != out:
        why = "an inpainting or editing model" if channels > out else "not a denoiser"
        raise UserError(
            f"{file}: the UNet takes {channels} channels and predicts {out}: {why}, which is not supported"
        )
    if channels != latents:
        raise UserError(
            f"{root}: the UNet works on {channels} latent channels, the VAE has {latents}; take both from one model"
        )
    width, hidden = unet.get("cross_attention_dim", 1280), text.get("hidden_size", 512)
    if width != hidden:
        raise UserError(
            f"{root}: the UNet takes text embeddings of width {width}, the text encoder has {hidden}; "
            "take both from one model"
        )
    first = tensors["unet"].get("conv_in.weight")
    if first is not None and first.shape[1:2] != (channels,):
        raise UserError(
            f"{root / 'unet'}: conv_in.weight takes {first.shape[1]} channels, config.json says {channels}"
        )


def weight_file(directory: Path) -> tuple[Path, str | None]:
    """The safetensors file of a part, and its variant: None, or "fp16"."""
    stem = _STEMS[directory.name]
    for variant in (None, "fp16"):
        file = directory / f"{stem}{'.' + variant if variant else ''}.safetensors"
        if file.is_file():
            return file, variant
    if pickled := next(iter(sorted(directory.glob("*.bin"))), None):
        raise UserError(
            f"{directory} has only pickled weights ({pickled.name}), which are not read; convert them once: "
            + conversion(pickled, directory / f"{stem}.safetensors")
        )
    raise UserError(f"{directory / stem}.safetensors: no such file")


def _load(cls: Any, directory: Path, **dtype: torch.dtype) -> Any:
    """One network from its directory; the file may be the fp16 variant."""
    file, variant = weight_file(directory)
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
        raise UserError(f"{file}: tensor {min(report['missing_keys'])!r} is missing")
    require_finite(model.named_parameters(), file)
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


def check_tokenizer(directory: Path) -> None:
    """UserError unless `directory` holds the files of a CLIP tokenizer, and they are real ones."""
    whole = (directory / "tokenizer.json").is_file()
    for name in () if whole else ("vocab.json", "merges.txt"):
        if not (directory / name).is_file():
            raise UserError(f"{directory / name}: no such file; expected the CLIP tokenizer's files")
    for file in sorted(directory.iterdir()):
        if file.suffix == ".json":
            read_json_object(file)
        elif file.name == "merges.txt":
            require_real_file(file)


def _load_tokenizer(root: Path) -> Any:
    from transformers import CLIPTokenizer

    if not (root / "tokenizer").is_dir():
        return None
    return CLIPTokenizer.from_pretrained(root / "tokenizer", local_files_only=True)


def scheduler_config(directory: Path) -> dict[str, Any]:
    """The settings in scheduler_config.json, for PNDM where the file is of a class that has no sampler here.

    Of such a class only the noise schedule counts; the rest is as in Stable Diffusion 1.x. UserError for a file that
    is missing or damaged, and for settings that are not covered.
    """
    from ubgen.diffusion.schedule import CLASSES, SD15

    file = directory / "scheduler_config.json"
    config = read_json_object(file)
    for key in ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule"):
        if key not in config:
            raise UserError(f"{file}: has no {key}; expected a scheduler of Stable Diffusion 1.x")
    if config.get("_class_name", "PNDMScheduler") in CLASSES:
        return config
    noise = {key: config[key] for key in _NOISE if key in config}
    return {**SD15, "timestep_spacing": "leading", **noise, "_class_name": "PNDMScheduler"}


def load_scheduler(directory: Path, sampler: str | None = None) -> Any:
    """The diffusers scheduler of a directory with scheduler_config.json, or the sampler of that name on its noise."""
    import diffusers

    config = scheduler_config(directory)
    scheduler = getattr(diffusers, config.get("_class_name", "PNDMScheduler")).from_config(config)
    return scheduler if sampler is None else with_sampler(scheduler, sampler)
