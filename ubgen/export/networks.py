"""The six networks of an engine as plain modules: tensors in, one tensor out, nothing left to do outside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ubgen.diffusion import StableDiffusion, decode
from ubgen.export.spec import BatchRange
from ubgen.rewards import Clip, QAlign
from ubgen.runtime import Dim, Signature, TensorSpec

if TYPE_CHECKING:
    from ubgen.export.inputs import RealInputs


class TextEncoder(nn.Module):
    """input_ids (B,S) int64 -> embeddings (B,S,D)."""

    def __init__(self, sd: StableDiffusion) -> None:
        super().__init__()
        self.encoder = sd.text_encoder

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.encoder(input_ids).last_hidden_state


class UNet(nn.Module):
    """latents (B,C,h,w), timestep (B,) float32, context (B,S,D) -> noise (B,C,h,w)."""

    def __init__(self, sd: StableDiffusion) -> None:
        super().__init__()
        self.unet = sd.unet

    def forward(self, latents: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        return self.unet(latents, timestep, context, return_dict=False)[0]


class VaeDecoder(nn.Module):
    """latents (B,C,h,w) -> pixels (B,H,W,3) uint8: clamped, rounded half to even."""

    def __init__(self, sd: StableDiffusion) -> None:
        super().__init__()
        self.vae = sd.vae

    def forward(self, latents: Tensor) -> Tensor:
        images_B3HW = decode(self.vae, latents)
        return (images_B3HW.clamp(0, 1) * 255).round().permute(0, 2, 3, 1).to(torch.uint8)


class ClipImage(nn.Module):
    """pixels (B,H,W,3) uint8 -> L2-normalised features (B,D); CLIP's preprocessing is inside."""

    def __init__(self, clip: Clip) -> None:
        super().__init__()
        self.clip = clip
        self.model = clip.model  # registers the weights

    def forward(self, pixels: Tensor) -> Tensor:
        return nn.functional.normalize(self.clip.encode_image(_to_images(pixels)), dim=-1)


class ClipText(nn.Module):
    """tokens (B,T) int64 -> L2-normalised features (B,D)."""

    def __init__(self, clip: Clip) -> None:
        super().__init__()
        self.model = clip.model

    def forward(self, tokens: Tensor) -> Tensor:
        features = self.model.encode_text(tokens)  # type: ignore[operator]
        return nn.functional.normalize(features, dim=-1)


class QAlignScore(nn.Module):
    """pixels (B,H,W,3) uint8 -> score (B,) in [1, 5]; Q-Align's preprocessing is inside."""

    def __init__(self, qalign: QAlign) -> None:
        super().__init__()
        self.qalign = qalign

    def forward(self, pixels: Tensor) -> Tensor:
        return self.qalign.score(_to_images(pixels))


def _to_images(pixels_BHW3: Tensor) -> Tensor:
    return pixels_BHW3.permute(0, 3, 1, 2).float() / 255


@dataclass(frozen=True)
class Exportable:
    """A network with the real inputs that it is traced on and compared on (each with at least 2 rows)."""

    module: nn.Module
    inputs: Sequence[Mapping[str, Tensor]]
    output: str

    @torch.no_grad()
    def reference(self, inputs: Mapping[str, Tensor]) -> Tensor:
        return self.module(**inputs)

    def signature(self, batch: BatchRange) -> Signature:
        """As the first real input shows it, with the first dimension of every tensor free within `batch`."""
        example = self.inputs[0]
        rows = Dim("batch", batch.min, batch.best, batch.max)
        inputs = tuple(_spec(name, tensor, rows) for name, tensor in example.items())
        return Signature(inputs, (_spec(self.output, self.reference(example), rows),))


def _spec(name: str, tensor: Tensor, rows: Dim) -> TensorSpec:
    return TensorSpec(name, tensor.dtype, (rows, *tensor.shape[1:]))


def stable_diffusion_networks(sd: StableDiffusion, real: RealInputs) -> dict[str, Exportable]:
    return {
        "text_encoder": Exportable(TextEncoder(sd).eval(), [{"input_ids": real.input_ids}], "embeddings"),
        "unet": Exportable(UNet(sd).eval(), real.unet_calls, "noise"),
        "vae_decoder": Exportable(VaeDecoder(sd).eval(), [{"latents": real.latents}], "pixels"),
    }


def clip_networks(clip: Clip, real: RealInputs) -> dict[str, Exportable]:
    tokens = clip.tokenizer([f"photo of {name}" for name in real.names])
    return {
        "clip_image": Exportable(ClipImage(clip).eval(), [{"pixels": real.pixels}], "features"),
        "clip_text": Exportable(ClipText(clip).eval(), [{"tokens": tokens}], "features"),
    }


def qalign_networks(qalign: QAlign, real: RealInputs) -> dict[str, Exportable]:
    return {"qalign": Exportable(QAlignScore(qalign).eval(), [{"pixels": real.pixels}], "score")}
