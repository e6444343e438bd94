"""The six networks of an engine as plain modules: float32 tensors in, one tensor out, nothing left to do outside."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ubgen.diffusion import StableDiffusion
from ubgen.export.qalign_graph import QAlignScorer
from ubgen.export.spec import BatchRange
from ubgen.rewards import Clip, QAlign, clip_preprocess
from ubgen.runtime import Dim, Signature, TensorSpec

if TYPE_CHECKING:
    from ubgen.export.inputs import RealInputs


class TextEncoder(nn.Module):
    """input_ids (B,S) int64 -> embeddings (B,S,D)."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.encoder(input_ids).last_hidden_state.float()


class UNet(nn.Module):
    """latents (B,C,h,w), timestep (B,), cond (B,S,D), uncond (1,S,D), guidance (1,) -> guided noise (B,C,h,w).

    Classifier-free guidance is inside: e_uncond + guidance * (e_cond - e_uncond), both from one call on 2B rows.
    """

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = with_plain_upsampling(unet)

    def forward(
        self, latents: Tensor, timestep: Tensor, cond: Tensor, uncond: Tensor, guidance: Tensor
    ) -> Tensor:
        context = torch.cat([uncond.expand_as(cond), cond])
        rows, times = torch.cat([latents, latents]), torch.cat([timestep, timestep])
        noise = self.unet(rows, times, context, return_dict=False)[0].float()
        e_uncond, e_cond = noise.unflatten(0, (2, -1)).unbind(0)
        return e_uncond + guidance * (e_cond - e_uncond)


class Upsample(nn.Module):
    """Nearest-neighbour times 2, then `conv`: diffusers' Upsample2D without its branch on the number of rows.

    That branch (a copy, from 64 rows on) would tie an exported graph to fewer rows.
    """

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor, output_size: Any = None) -> Tensor:
        if output_size is None:
            return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return self.conv(F.interpolate(x, size=output_size, mode="nearest"))


def with_plain_upsampling(network: nn.Module) -> nn.Module:
    """A copy of `network` that shares its tensors, with `Upsample` in the place of diffusers' Upsample2D."""
    shared = {id(t): t for t in [*network.parameters(), *network.buffers()]}
    network = copy.deepcopy(network, shared)
    for part in network.modules():
        upsamplers = getattr(part, "upsamplers", None)
        for i, old in enumerate(upsamplers if isinstance(upsamplers, nn.ModuleList) else ()):
            if type(old).__name__ == "Upsample2D" and old.use_conv and old.norm is None:
                upsamplers[i] = Upsample(old.conv)
    return network


class VaeDecoder(nn.Module):
    """latents (B,C,h,w) -> pixels (B,H,W,3) uint8: clamped, rounded half to even.

    An image with NaN or an infinity in it comes out black: 8 bits cannot say so, and synthesis rejects one colour.
    """

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.scaling_factor = vae.config.scaling_factor
        self.post_quant_conv = vae.post_quant_conv if vae.config.use_post_quant_conv else nn.Identity()
        self.decoder = with_plain_upsampling(vae.decoder)

    def forward(self, latents: Tensor) -> Tensor:
        decoded = self.decoder(self.post_quant_conv(latents / self.scaling_factor)).float()
        levels = ((decoded / 2 + 0.5).clamp(0, 1) * 255).round()
        finite = decoded.mean(dim=(1, 2, 3), keepdim=True).abs() < torch.inf
        levels = torch.where(finite, levels, 0.0)
        return levels.permute(0, 2, 3, 1).to(torch.uint8)


class ClipImage(nn.Module):
    """pixels (B,H,W,3) uint8 -> L2-normalised features (B,D); CLIP's preprocessing is inside."""

    def __init__(self, clip: Clip) -> None:
        super().__init__()
        self.image_size = clip.image_size
        self.visual: nn.Module = clip.model.visual  # type: ignore[assignment]

    def forward(self, pixels: Tensor) -> Tensor:
        images_B3HW = pixels.float().permute(0, 3, 1, 2) / 255  # in this order: TensorRT permutes no bytes
        features = self.visual(clip_preprocess(images_B3HW, self.image_size))
        return nn.functional.normalize(features.float(), dim=-1)


class ClipText(nn.Module):
    """tokens (B,T) int64 -> L2-normalised features (B,D)."""

    def __init__(self, clip: Clip) -> None:
        super().__init__()
        self.model = copy.copy(clip.model)  # shares the weights; without the image tower, the larger part
        self.model._modules = {k: v for k, v in clip.model._modules.items() if k != "visual"}

    def forward(self, tokens: Tensor) -> Tensor:
        features = self.model.encode_text(tokens)  # type: ignore[operator]
        return nn.functional.normalize(features.float(), dim=-1)


@dataclass(frozen=True)
class Exportable:
    """A network with the real inputs that it is traced on and compared on (each with at least 2 rows).

    `constant` names the inputs that all rows share: their first dimension is 1, whatever the batch.
    """

    module: nn.Module
    inputs: Sequence[Mapping[str, Tensor]]
    output: str
    constant: frozenset[str] = frozenset()

    @torch.no_grad()
    def reference(self, inputs: Mapping[str, Tensor]) -> Tensor:
        return self.module(**inputs)

    def example(self, batch: BatchRange) -> dict[str, Tensor]:
        """Rows to trace on: two where the batch is free, since a single one would become a constant of the graph."""
        return self.rows(self.inputs[0], 0, min(2, batch.max))

    def rows(self, inputs: Mapping[str, Tensor], start: int, stop: int) -> dict[str, Tensor]:
        """Rows [start, stop) of `inputs`; the shared inputs whole."""
        return {name: t if name in self.constant else t[start:stop] for name, t in inputs.items()}

    def count(self, inputs: Mapping[str, Tensor]) -> int:
        return next(len(tensor) for name, tensor in inputs.items() if name not in self.constant)

    def dynamic_shapes(self, batch: BatchRange) -> dict[str, dict[int, Any]] | None:
        """For `torch.export` and `torch.onnx.export`; None when the range is the single size 1."""
        if batch.max == 1:
            return None
        rows = torch.export.Dim("batch", min=batch.min, max=batch.max)
        return {name: {} if name in self.constant else {0: rows} for name in self.inputs[0]}

    def input_specs(self, batch: BatchRange) -> tuple[TensorSpec, ...]:
        """As a real input shows them, with the batch free in its range."""
        rows = _rows(batch)
        return tuple(_spec(n, t, 1 if n in self.constant else rows) for n, t in self.inputs[0].items())

    def signature(self, batch: BatchRange, output: Tensor | None = None) -> Signature:
        """`input_specs`, and the output as it is computed from a real input if it is not given."""
        result = self.reference(self.example(batch)) if output is None else output
        return Signature(self.input_specs(batch), (_spec(self.output, result, _rows(batch)),))


def _rows(batch: BatchRange) -> Dim:
    return Dim("batch", batch.min, batch.best, batch.max)


def _spec(name: str, tensor: Tensor, rows: Dim | int) -> TensorSpec:
    return TensorSpec(name, tensor.dtype, (rows, *tensor.shape[1:]))


def stable_diffusion_networks(sd: StableDiffusion, real: RealInputs) -> dict[str, Exportable]:
    shared = frozenset({"uncond", "guidance"})
    return {
        "text_encoder": Exportable(
            TextEncoder(sd.text_encoder).eval(), [{"input_ids": real.input_ids}], "embeddings"
        ),
        "unet": Exportable(UNet(sd.unet).eval(), real.unet_calls, "noise", shared),
        "vae_decoder": Exportable(VaeDecoder(sd.vae).eval(), [{"latents": real.latents}], "pixels"),
    }


def clip_networks(clip: Clip, real: RealInputs) -> dict[str, Exportable]:
    tokens = clip.tokenizer([f"photo of {name}" for name in real.names])
    return {
        "clip_image": Exportable(ClipImage(clip).eval(), [{"pixels": real.pixels}], "features"),
        "clip_text": Exportable(ClipText(clip).eval(), [{"tokens": tokens}], "features"),
    }


def qalign_networks(qalign: QAlign, real: RealInputs) -> dict[str, Exportable]:
    return {"qalign": Exportable(QAlignScorer(qalign).eval(), [{"pixels": real.pixels}], "score")}
