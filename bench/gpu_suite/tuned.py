"""Stable Diffusion's UNet written again for inference, on the modules of diffusers: the same function, less work.

Exact in real numbers; what is left out is only work whose result is known already:

- ahead: the keys and values of the prompts are computed once for all steps, and what each residual block takes from
  the timestep is looked up in a table of all timesteps;
- fused: one matrix product gives query, key and value of a self-attention;
- shared start: both guidance branches see the same latents, so up to the first cross-attention they are one;
- phases: a nearest-neighbour enlargement followed by a 3x3 convolution is four 2x2 convolutions on the small image
  (44 % of the multiplications), whose weights are sums of the 3x3's;
- native norms: GroupNorm and SiLU in one pass, on channels-last tensors too, where PyTorch would copy.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ubgen import ops

TIMESTEPS = 1000


@dataclass(frozen=True)
class Tuning:
    """`ahead` and `fused` always hold."""

    shared_start: bool = True
    phases: bool = True
    native_norm: bool = False


class PhaseUpsample(nn.Module):
    """Nearest-neighbour times 2, then `conv` (3x3, padding 1): (B,C,h,w) -> (B,D,2h,2w)."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        rows = _merged(conv.weight.detach().double(), 2)  # two (D,C,2,3): output rows 2i and 2i + 1
        phases = [phase for row in rows for phase in _merged(row, 3)]
        self.weight = nn.Parameter(torch.cat(phases).to(conv.weight), requires_grad=False)
        assert conv.bias is not None
        self.bias = nn.Parameter(conv.bias.detach().repeat(4), requires_grad=False)

    def forward(self, x: Tensor, output_size: object = None) -> Tensor:
        height, width = x.shape[2:]
        phases = F.conv2d(x, self.weight, self.bias, padding=1).permute(0, 2, 3, 1).chunk(4, dim=-1)
        out = x.new_empty(len(x), height, 2, width, 2, phases[0].shape[-1])  # channels last
        for a, b in ((0, 0), (0, 1), (1, 0), (1, 1)):
            out[:, :, a, :, b] = phases[2 * a + b][:, a : a + height, b : b + width]
        return out.flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)


def _merged(weight: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Along `dim`, for the even output: taps (x[i-1], x[i]); for the odd one: (x[i], x[i+1])."""
    first, middle, last = weight.unbind(dim)
    return torch.stack([first, middle + last], dim), torch.stack([first + middle, last], dim)


class TunedUNet(nn.Module):
    """latents (B,C,h,w) float32, timestep (B,) in 0..999 -> guided noise like `ubgen.export.networks.UNet`.

    `set_prompts` comes first, with as many rows as the latents have. Takes over the weights of `unet`, a diffusers UNet
    of the kind that Stable Diffusion 1.x has, which can't be used otherwise afterwards. Lower its precision only once
    it is made: what is merged and tabulated here is then rounded once.
    """

    times: Tensor

    def __init__(self, unet: Any, tuning: Tuning, guidance: float) -> None:
        super().__init__()
        config = unet.config
        assert config.transformer_layers_per_block == 1
        assert config.resnet_time_scale_shift == "default"
        self.tuning, self.guidance = tuning, guidance
        self.unet = unet
        self.resnets = [m for m in unet.modules() if type(m).__name__ == "ResnetBlock2D"]
        self.transformers = [m for m in unet.modules() if type(m).__name__ == "Transformer2DModel"]
        widths = [resnet.time_emb_proj.out_features for resnet in self.resnets]
        for resnet, span in zip(self.resnets, _spans(widths), strict=True):
            resnet.span = span
        self.register_buffer("times", self._time_table())
        for transformer in self.transformers:
            _fuse(transformer.transformer_blocks[0].attn1)
        if tuning.phases:
            for block in unet.up_blocks:
                if block.upsamplers:
                    block.upsamplers[0] = PhaseUpsample(block.upsamplers[0].conv)

    @property
    def dtype(self) -> torch.dtype:
        return self.times.dtype

    @torch.no_grad()
    def set_prompts(self, cond: Tensor, uncond: Tensor) -> None:
        """cond (B,S,D), uncond (1,S,D). The keys and values stay at their addresses while their size is the same."""
        context = torch.cat([uncond.expand_as(cond), cond]).to(self.dtype)
        for transformer in self.transformers:
            attention = transformer.transformer_blocks[0].attn2
            for name, projection in (("keys", attention.to_k), ("values", attention.to_v)):
                heads = _heads(projection(context), attention.heads).contiguous()
                before = getattr(attention, name, None)
                if before is not None and before.shape == heads.shape:
                    before.copy_(heads)
                else:
                    attention.register_buffer(name, heads, persistent=False)

    def to_precision(self, dtype: torch.dtype) -> "TunedUNet":
        """All weights in `dtype`, but those of native norms, which that kernel takes in float32."""
        self.to(dtype)
        if self.tuning.native_norm:
            norms = [norm for resnet in self.resnets for norm in (resnet.norm1, resnet.norm2)]
            for norm in (*norms, self.unet.conv_norm_out):
                norm.float()
        return self

    def forward(self, latents: Tensor, timestep: Tensor) -> Tensor:
        unet, times = self.unet, self.times[timestep.long()]
        x = latents.to(self.dtype, memory_format=_layout(unet.conv_in.weight))
        if not self.tuning.shared_start:
            x, times = _doubled(x), _doubled(times)
        x = unet.conv_in(x)
        skips = [x]
        for block in unet.down_blocks:
            for resnet, transformer in _layers(block):
                x, times = self._layer(resnet, transformer, x, times)
                skips.append(x)
            if block.downsamplers:
                x = block.downsamplers[0](x)
                skips.append(x)
        x = self._resnet(unet.mid_block.resnets[0], x, times)
        for transformer, resnet in zip(unet.mid_block.attentions, unet.mid_block.resnets[1:], strict=True):
            x = self._resnet(resnet, self._transformer(transformer, x), times)
        for block in unet.up_blocks:
            for resnet, transformer in _layers(block):
                skip = skips.pop()
                skip = _doubled(skip) if len(skip) < len(x) else skip
                x, times = self._layer(resnet, transformer, torch.cat([x, skip], dim=1), times)
            if block.upsamplers:
                x = block.upsamplers[0](x)
        noise = unet.conv_out(self._norm_silu(unet.conv_norm_out, x)).float()
        e_uncond, e_cond = noise.unflatten(0, (2, -1)).unbind(0)
        return e_uncond + self.guidance * (e_cond - e_uncond)

    def _layer(self, resnet: Any, transformer: Any, x: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        x = self._resnet(resnet, x, times)
        if transformer is None:
            return x, times
        y = self._transformer(transformer, x)
        return y, times if len(times) == len(y) else _doubled(times)

    def _resnet(self, resnet: Any, x: Tensor, times: Tensor) -> Tensor:
        start, stop = resnet.span
        h = F.conv2d(self._norm_silu(resnet.norm1, x), resnet.conv1.weight, padding=1)
        h = h + times[:, start:stop, None, None]  # the convolution's bias is in the table
        h = resnet.conv2(self._norm_silu(resnet.norm2, h))
        return h + (x if resnet.conv_shortcut is None else resnet.conv_shortcut(x))

    def _transformer(self, transformer: Any, x: Tensor) -> Tensor:
        """(B,C,h,w); the first one of a shared start takes B rows and returns 2B."""
        block, shape = transformer.transformer_blocks[0], x.shape
        tokens = transformer.proj_in(transformer.norm(x)).permute(0, 2, 3, 1).flatten(1, 2)
        tokens = tokens + _self_attention(block.attn1, block.norm1(tokens))
        if len(tokens) < len(block.attn2.keys):
            tokens, x = _doubled(tokens), _doubled(x)
        tokens = tokens + _cross_attention(block.attn2, block.norm2(tokens))
        tokens = tokens + block.ff(block.norm3(tokens))
        image = tokens.unflatten(1, shape[2:]).permute(0, 3, 1, 2)
        return transformer.proj_out(image) + x

    def _norm_silu(self, norm: nn.GroupNorm, x: Tensor) -> Tensor:
        if self.tuning.native_norm:
            return ops.group_norm_silu(x, norm.num_groups, norm.weight, norm.bias, norm.eps)
        return F.silu(norm(x))

    @torch.no_grad()
    def _time_table(self) -> Tensor:
        """(1000, sum of widths): what every residual block adds after its first convolution, its bias included."""
        device = self.unet.conv_in.weight.device
        steps = torch.arange(TIMESTEPS, device=device, dtype=torch.float32)
        embedding = self.unet.time_embedding(self.unet.time_proj(steps).to(self.unet.dtype))
        active = F.silu(embedding)
        return torch.cat([r.time_emb_proj(active) + r.conv1.bias for r in self.resnets], dim=1)


def native_norms(module: nn.Module) -> None:
    """GroupNorm + SiLU of every residual block without a timestep (a decoder's), in place, by the native kernel."""
    for part in module.modules():
        if type(part).__name__ == "ResnetBlock2D":
            assert part.time_emb_proj is None
            part.norm1, part.norm2, part.nonlinearity = (
                _Native(part.norm1),
                _Native(part.norm2),
                nn.Identity(),
            )
        elif isinstance(norm := getattr(part, "conv_norm_out", None), nn.GroupNorm):
            part.conv_norm_out, part.conv_act = _Native(norm), nn.Identity()


def phase_upsamplers(module: nn.Module) -> None:
    """Every enlargement of `module` as four small convolutions, in place."""
    for part in module.modules():
        upsamplers = getattr(part, "upsamplers", None)
        if isinstance(upsamplers, nn.ModuleList):
            enlarge: Any = upsamplers[0]
            upsamplers[0] = PhaseUpsample(enlarge.conv)


class _Native(nn.Module):
    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.norm = norm.float()  # what the kernel takes

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        return ops.group_norm_silu(x, norm.num_groups, norm.weight, norm.bias, norm.eps)


def _layers(block: Any) -> Iterator[tuple[Any, Any]]:
    """(resnet, transformer or None) pairs."""
    transformers = getattr(block, "attentions", None) or [None] * len(block.resnets)
    return zip(block.resnets, transformers, strict=True)


def _fuse(attention: Any) -> None:
    weights = [attention.to_q.weight, attention.to_k.weight, attention.to_v.weight]
    attention.register_buffer("qkv", torch.cat([weight.detach() for weight in weights]), persistent=False)
    del attention.to_q, attention.to_k, attention.to_v


def _self_attention(attention: Any, x_BND: Tensor) -> Tensor:
    qkv = F.linear(x_BND, attention.qkv).unflatten(-1, (3, attention.heads, -1))
    query, key, value = (part.transpose(1, 2) for part in qkv.unbind(2))
    return _out(attention, F.scaled_dot_product_attention(query, key, value))


def _cross_attention(attention: Any, x_BND: Tensor) -> Tensor:
    query = _heads(attention.to_q(x_BND), attention.heads)
    return _out(attention, F.scaled_dot_product_attention(query, attention.keys, attention.values))


def _out(attention: Any, x_BHNd: Tensor) -> Tensor:
    return attention.to_out[0](x_BHNd.transpose(1, 2).flatten(2))


def _heads(x_BND: Tensor, heads: int) -> Tensor:
    return x_BND.unflatten(-1, (heads, -1)).transpose(1, 2)


def _doubled(x: Tensor) -> Tensor:
    return torch.cat([x, x])


def _spans(widths: list[int]) -> list[tuple[int, int]]:
    ends = [sum(widths[: i + 1]) for i in range(len(widths))]
    return [(end - width, end) for width, end in zip(widths, ends, strict=True)]


def _layout(weight: Tensor) -> torch.memory_format:
    last = weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format
