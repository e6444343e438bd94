"""The six networks of an engine as plain modules: float32 tensors in, one tensor out, nothing left to do outside.

They are put together here alone, with weights or on "meta" for a plan.
"""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ubgen.core.errors import UserError
from ubgen.core.weights import read_json_object
from ubgen.diffusion import StableDiffusion, read_lora
from ubgen.export.exportable import Exportable
from ubgen.export.qalign_graph import QAlignScorer
from ubgen.rewards import Clip, QAlign, clip_preprocess
from ubgen.rewards.clip_files import find_clip, meta_clip


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


def stable_diffusion_networks(
    sd: StableDiffusion, input_ids: Tensor, unet_calls: Sequence[Mapping[str, Tensor]], latents: Tensor
) -> dict[str, Exportable]:
    """`input_ids` (N,S), the UNet's inputs by name at some of its calls, final `latents` (N,C,h,w)."""
    shared = frozenset({"uncond", "guidance"})
    return {
        "text_encoder": Exportable(
            TextEncoder(sd.text_encoder).eval(), [{"input_ids": input_ids}], "embeddings"
        ),
        "unet": Exportable(UNet(sd.unet).eval(), unet_calls, "noise", shared),
        "vae_decoder": Exportable(VaeDecoder(sd.vae).eval(), [{"latents": latents}], "pixels"),
    }


def clip_networks(clip: Clip, pixels: Tensor, tokens: Tensor) -> dict[str, Exportable]:
    """`pixels` (N,H,W,3) uint8, `tokens` (N,T) of texts."""
    return {
        "clip_image": Exportable(ClipImage(clip).eval(), [{"pixels": pixels}], "features"),
        "clip_text": Exportable(ClipText(clip).eval(), [{"tokens": tokens}], "features"),
    }


def qalign_networks(qalign: QAlign, pixels: Tensor) -> dict[str, Exportable]:
    """`pixels` (N,H,W,3) uint8."""
    return {"qalign": Exportable(QAlignScorer(qalign).eval(), [{"pixels": pixels}], "score")}


def meta_networks(image_size: int, weights: Mapping[str, Path]) -> dict[str, Exportable]:
    """All six without weights, with two rows of inputs without values, from the weights' config files.

    UserError when the image size or the LoRA does not fit the networks.
    """
    sd, clip, qalign = (
        meta_stable_diffusion(weights["stable_diffusion"]),
        _meta_clip(weights["clip"]),
        _meta_qalign(weights["qalign"]),
    )
    _check_image_size(image_size, sd)
    if "lora" in weights:
        read_lora(sd.unet, weights["lora"])
    unet, text, side = sd.unet.config, sd.text_encoder.config, image_size // vae_scale(sd.vae.config)
    latents = _empty(unet["in_channels"], side, side)
    prompt = _empty(text.max_position_embeddings, unet["cross_attention_dim"])
    unet_call = {
        "latents": latents,
        "timestep": _empty(),
        "cond": prompt,
        "uncond": prompt[:1],
        "guidance": torch.empty(1, device="meta"),
    }
    ids = _empty(text.max_position_embeddings, dtype=torch.int64)
    pixels = _empty(image_size, image_size, 3, dtype=torch.uint8)
    tokens = _empty(clip.model.context_length, dtype=torch.int64)  # type: ignore[arg-type]
    return {
        **stable_diffusion_networks(sd, ids, [unet_call], latents),
        **clip_networks(clip, pixels, tokens),
        **qalign_networks(qalign, pixels),
    }


def vae_scale(config: Any) -> int:
    """Pixels per latent, along one side."""
    return 2 ** (len(config["block_out_channels"]) - 1)


def _empty(*row: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(2, *row, dtype=dtype, device="meta")


def _check_image_size(size: int, sd: StableDiffusion) -> None:
    """The UNet halves the latents between its blocks, and each time the size must be even."""
    step = vae_scale(sd.vae.config) * 2 ** (len(sd.unet.config["block_out_channels"]) - 1)
    if size % step:
        raise UserError(
            f"image_size must be a multiple of {step} for these Stable Diffusion weights, not {size}"
        )


def meta_stable_diffusion(path: Path) -> StableDiffusion:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        return StableDiffusion(
            unet=UNet2DConditionModel.from_config(read_json_object(path / "unet" / "config.json")).eval(),
            vae=AutoencoderKL.from_config(read_json_object(path / "vae" / "config.json")).eval(),
            text_encoder=CLIPTextModel(
                CLIPTextConfig(**read_json_object(path / "text_encoder" / "config.json"))
            ).eval(),
            tokenizer=None,
            scheduler=None,
            path=path,
        )


def _meta_clip(path: Path) -> Clip:
    model = meta_clip(find_clip(path))
    side: Any = model.get_submodule("visual").image_size  # open_clip gives a pair for its transformers
    return Clip(model, None, side if isinstance(side, int) else side[0], 0)


def _meta_qalign(path: Path) -> QAlign:
    from ubgen.rewards.qalign_weights import check_weight_files, read_config

    with torch.device("meta"):
        model = QAlign(read_config(path))
    check_weight_files(path, {name: tensor.shape for name, tensor in model.state_dict().items()})
    return model.to("meta").eval()
