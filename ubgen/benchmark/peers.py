"""The peers of an engine: eager PyTorch and diffusers' own pipeline, on the weights that the engine was made from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ubgen.core.config import resolve_path
from ubgen.core.errors import UserError
from ubgen.diffusion import StableDiffusion, load_stable_diffusion, merge_lora, with_sampler
from ubgen.export.directory import EngineDirectory
from ubgen.export.mixed_precision import DTYPES
from ubgen.export.networks import ClipText, UNet, VaeDecoder
from ubgen.rewards import Clip, QAlign
from ubgen.runtime import EngineSet

Call = Callable[[Mapping[str, Tensor]], Tensor]


@dataclass(frozen=True)
class Peers:
    """`networks` take the inputs of the engine's networks by name; `pipeline` is diffusers', on the same UNet."""

    networks: Mapping[str, Call]
    pipeline: Any
    _compiled: dict[str, Call] = field(default_factory=dict)

    def compiled(self, name: str) -> Call:
        """The network `name` through `torch.compile` with its defaults; compiled when it is first called."""
        if name not in self._compiled:
            self._compiled[name] = torch.compile(self.networks[name])
        return self._compiled[name]


def check_against(against: Sequence[str], known: Sequence[str]) -> None:
    """UserError for a side that is not known."""
    if unknown := [name for name in against if name not in known]:
        raise UserError(f"--against must be one of {', '.join(known)}, not {unknown[0]}")


def missing_weights(engines: EngineSet) -> str:
    """Why the engine's weights cannot be run beside it; empty when they are all where they were, unchanged."""
    recorded: Mapping[str, Any] = engines.manifest["inputs"]
    hashes = EngineDirectory(engines.path).hashes
    for name, entry in recorded.items():
        path = Path(entry["path"])
        if not path.exists():
            return f"the {name} weights are no longer at {path}"
        if hashes(path) != entry["hash"]:
            return f"the {name} weights at {path} are not those that the engine was made from"
    return ""


def load_peers(engines: EngineSet) -> Peers:
    """Every network in the precision of its engine, as a user of PyTorch would load it; the LoRA is merged."""
    paths: Mapping[str, str] = engines.manifest["config"]["weights"]
    entries, device = engines.manifest["engine"]["networks"], engines.device
    dtypes = {name: DTYPES[entry["precision"]] for name, entry in entries.items()}
    sd = load_stable_diffusion(paths["stable_diffusion"])
    if "lora" in paths:
        merge_lora(sd.unet, paths["lora"])
        sd.unet.eval().requires_grad_(False)
    parts = {"unet": sd.unet, "vae_decoder": sd.vae, "text_encoder": sd.text_encoder}
    for name, part in parts.items():
        part.to(device)
        if part.dtype != dtypes[name]:
            part.to(dtypes[name])
    clip = Clip.load(resolve_path(paths["clip"]), dtypes["clip_image"], device)
    qalign = QAlign.load(resolve_path(paths["qalign"]), dtypes["qalign"], device)
    return Peers({**_generator_calls(sd), **_scorer_calls(clip, qalign)}, _pipeline(sd))


def _generator_calls(sd: StableDiffusion) -> dict[str, Call]:
    unet, decoder = UNet(sd.unet), VaeDecoder(sd.vae)
    half = ("latents", "cond", "uncond")

    def denoise(inputs: Mapping[str, Tensor]) -> Tensor:
        return unet(**{name: t.to(sd.unet.dtype) if name in half else t for name, t in inputs.items()})

    return {
        "text_encoder": lambda inputs: sd.text_encoder(inputs["input_ids"]).last_hidden_state.float(),
        "unet": denoise,
        "vae_decoder": lambda inputs: decoder(inputs["latents"].to(sd.vae.dtype)),
    }


def _scorer_calls(clip: Clip, qalign: QAlign) -> dict[str, Call]:
    texts = ClipText(clip)

    def images_B3HW(inputs: Mapping[str, Tensor]) -> Tensor:
        return inputs["pixels"].permute(0, 3, 1, 2).float() / 255

    return {
        "clip_image": lambda inputs: F.normalize(clip.encode_image(images_B3HW(inputs)).float(), dim=-1),
        "clip_text": lambda inputs: texts(inputs["tokens"]),
        "qalign": lambda inputs: qalign.score(images_B3HW(inputs)),
    }


def _pipeline(sd: StableDiffusion) -> Any:
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline(
        vae=sd.vae,
        text_encoder=sd.text_encoder,
        tokenizer=sd.tokenizer,
        unet=sd.unet,
        scheduler=with_sampler(sd.scheduler, "pndm"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
