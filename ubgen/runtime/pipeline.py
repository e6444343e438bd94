"""The networks of an engine one after the other: prompts and noise to latents, pixels and scores."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ubgen.core.errors import UserError
from ubgen.diffusion import initial_noise, load_scheduler, sample_guided
from ubgen.rewards.clip_files import clip_tokenizer
from ubgen.runtime.network import Network, run_rows

NETWORKS = ("text_encoder", "unet", "vae_decoder", "clip_image", "clip_text", "qalign")


class Scores(NamedTuple):
    """Of N images."""

    similarity: Tensor
    """(N,) cosine similarity to "photo of {class}" in CLIP's space."""
    quality: Tensor
    """(N,) in [1, 5]."""
    features: Tensor
    """(N,D) CLIP image features, L2-normalised."""


class Pipeline:
    """Samples with PNDM and classifier-free guidance, and scores what comes out.

    `networks` holds those of `NETWORKS` by name, all on one device. The two tokenizers and the scheduler's settings
    lie in the engine directory `path`. Every method takes any number of rows.
    """

    def __init__(self, networks: Mapping[str, Network], path: Path, *, steps: int, guidance: float) -> None:
        for name in NETWORKS:
            if name not in networks:
                raise UserError(f"{path} has no network {name!r}; export it again")
        self._networks = {name: networks[name] for name in NETWORKS}  # opens them
        self._path = path
        self._steps = steps
        unet = networks["unet"]
        self.device = torch.device(unet.device)
        self.batch = unet.signature.batch
        self.latent_shape = _row_shape(unet, "latents")
        self.guidance = torch.tensor([guidance], dtype=torch.float32, device=self.device)
        self._scheduler = load_scheduler(path / "scheduler", "pndm")
        self.uncond = self.encode_prompts([""])

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """(N,S) int64 ids of Stable Diffusion's text encoder."""
        from transformers import CLIPTokenizer

        (length,) = _row_shape(self._networks["text_encoder"], "input_ids")
        tokenizer = CLIPTokenizer.from_pretrained(self._path / "tokenizer", local_files_only=True)
        tokens = tokenizer(
            list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        )
        return tokens.input_ids

    def tokenize_photos(self, names: Sequence[str]) -> Tensor:
        """(N,T) int64 ids of "photo of {name}" for CLIP's text encoder."""
        return clip_tokenizer(self._path / "clip")([f"photo of {name}" for name in names])

    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        """(N,S,D)"""
        return self._run("text_encoder", "embeddings", input_ids=self.tokenize(prompts))

    def encode_photos(self, names: Sequence[str]) -> Tensor:
        """(N,D) CLIP features of "photo of {name}", L2-normalised."""
        return self._run("clip_text", "features", tokens=self.tokenize_photos(names))

    def predict(self, latents: Tensor, timestep: Tensor, cond: Tensor) -> Tensor:
        """(N,C,h,w) guided noise, from one call of the UNet; `timestep` (N,) float32."""
        inputs = {"latents": latents, "timestep": timestep, "cond": cond}
        return self._run("unet", "noise", **inputs, uncond=self.uncond, guidance=self.guidance)

    def denoise(self, noise: Tensor, cond: Tensor, steps: int | None = None) -> Tensor:
        """(N,C,h,w) latents from standard normal `noise`."""
        return sample_guided(
            lambda latents, timestep: self.predict(latents, timestep, cond),
            self._scheduler,
            noise.to(self.device, non_blocking=True),
            steps=steps or self._steps,
        )

    def decode(self, latents: Tensor) -> Tensor:
        """(N,H,W,3) uint8: the decoder's graph ends in bytes, so that no more than these leave the device."""
        return self._run("vae_decoder", "pixels", latents=latents)

    def score(self, pixels: Tensor, photos: Tensor) -> Scores:
        """What CLIP and Q-Align say of each image; `photos` are the classes' features (see `encode_photos`)."""
        features = self._run("clip_image", "features", pixels=pixels)
        similarity = (features * photos).sum(dim=-1)
        return Scores(similarity, self._run("qalign", "score", pixels=pixels), features)

    def same_bits(self, prompts: Sequence[str]) -> dict[str, Any]:
        """Whether a row's result depends on the other rows of a call, tried on one call of every network.

        {"batch": the UNet's best batch, "position": a row is the same to the last bit at another place among so many,
        "size": it is the same in a call of its own}. Other sizes are not tried. Images start from `prompts`, in turns.
        """
        rows = self.batch.best
        index = torch.arange(rows, device=self.device) % len(prompts)
        cond = self.encode_prompts(prompts)[index]
        noise = torch.stack(
            [initial_noise(0, i % len(prompts), i // len(prompts), self.latent_shape) for i in range(rows)]
        ).to(self.device)
        whole, turned = self._single_calls(noise, cond), self._single_calls(noise.flip(0), cond.flip(0))
        alone = self._single_calls(noise[:1], cond[:1])
        return {
            "batch": rows,
            "position": all(torch.equal(a, b.flip(0)) for a, b in zip(whole, turned, strict=True)),
            "size": all(torch.equal(a[:1], b) for a, b in zip(whole, alone, strict=True)),
        }

    def warm_up(self, rows: int) -> None:
        """Call every network that works on images twice, on `rows` rows.

        At its second call a size of batch is captured as a CUDA graph, and nothing else may use the GPU meanwhile: on a
        GPU this comes before several threads share the pipeline.
        """
        noise, cond = torch.zeros(rows, *self.latent_shape, device=self.device), self.uncond
        for _ in range(2):
            self._single_calls(noise, cond.expand(rows, *cond.shape[1:]))

    @torch.no_grad()
    def _single_calls(self, noise: Tensor, cond: Tensor) -> list[Tensor]:
        timestep = torch.full((len(noise),), 501.0, device=self.device)
        pixels = self.decode(noise)
        features = self._run("clip_image", "features", pixels=pixels)
        return [
            self.predict(noise, timestep, cond),
            pixels,
            features,
            self._run("qalign", "score", pixels=pixels),
        ]

    def _run(self, name: str, output: str, **inputs: Tensor) -> Tensor:
        return run_rows(self._networks[name], inputs)[output]


def _row_shape(network: Network, name: str) -> tuple[int, ...]:
    spec = next(spec for spec in network.signature.inputs if spec.name == name)
    return tuple(int(size) for size in spec.shape[1:])  # type: ignore[arg-type]
