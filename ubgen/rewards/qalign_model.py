"""Q-Align's three networks. Modules are named so that state_dict() has the public checkpoint's keys.

Shapes: N = patches + 1 vision tokens, Q learned queries, S prompt positions after the image is spliced in.
Everything is static in S, so the networks export with a dynamic batch alone.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint as recompute

from ubgen.rewards.qalign_config import AbstractorConfig, QAlignConfig, VisionConfig


def _run(layer: nn.Module, checkpoint: bool, *args: object) -> Tensor:
    """One layer; with `checkpoint` its activations are computed again in the backward pass, not kept.

    The weights of a layer that `offload` has marked are brought to its input's device for the call, and again for the
    backward pass.
    """
    if getattr(layer, "offloaded", False):
        return recompute(_bring, layer, *args, use_reentrant=False)
    return recompute(layer, *args, use_reentrant=False) if checkpoint else layer(*args)


def _bring(layer: nn.Module, x: Tensor, *rest: object) -> Tensor:
    tensors = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    weights = {name: tensor.to(x.device, non_blocking=True) for name, tensor in tensors.items()}
    return torch.func.functional_call(layer, weights, (x, *rest))


def offload(model: nn.Module, layers: Iterable[nn.Module], device: torch.device) -> None:
    """Move `model`, frozen, to `device`, all but `layers`: those stay in the host's memory, and come when called."""
    held = set[nn.Module]()
    for layer in layers:
        layer.offloaded = True  # type: ignore[assignment]
        held |= set(layer.modules())
    for module in model.modules():
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if module not in held:
                moved = tensor.detach().to(device)
                setattr(
                    module, name, nn.Parameter(moved, False) if isinstance(tensor, nn.Parameter) else moved
                )
            elif device.type == "cuda":
                tensor.data = tensor.data.pin_memory()  # is copied without waiting


def _split_heads(x_BSD: Tensor, heads: int) -> Tensor:
    return x_BSD.unflatten(-1, (heads, -1)).transpose(1, 2)


def _attend(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    """(B, H, S, d) each -> (B, S, H * d); scale 1 / sqrt(d)."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2)


# --- vision tower ---


class VisionEmbeddings(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.position_embedding = nn.Parameter(torch.zeros(1, config.tokens, width))
        self.patch_embed = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.pre_layernorm = nn.LayerNorm(width, eps=config.layer_norm_eps)

    def forward(self, pixels_B3HW: Tensor) -> Tensor:
        patches = self.patch_embed(pixels_B3HW).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_token.expand(patches.shape[0], -1, -1), patches], dim=1)
        return self.pre_layernorm(tokens + self.position_embedding)


class VisionAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query_key_value = nn.Linear(width, 3 * width)
        self.dense = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        # the 3D channels are ordered head by head: q_h, k_h, v_h, then the next head
        qkv = self.query_key_value(x).unflatten(-1, (self.heads, 3, -1)).transpose(1, 2)
        return self.dense(_attend(*qkv.unbind(3)))


class VisionMLP(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        return self.fc2(x * torch.sigmoid(1.702 * x))  # QuickGELU


class VisionLayer(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.self_attn = VisionAttention(width, config.num_attention_heads)
        self.input_layernorm = nn.LayerNorm(width, eps=eps)
        self.mlp = VisionMLP(width, config.intermediate_size)
        self.post_attention_layernorm = nn.LayerNorm(width, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class LayerStack(nn.Module):
    """Only a name: the checkpoint keeps layers under `encoder.layers`."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)


class VisionTower(nn.Module):
    """Normalised pixels (B, 3, image_size, image_size) -> (B, N, D), class token first, all normalised."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.embeddings = VisionEmbeddings(config)
        self.encoder = LayerStack([VisionLayer(config) for _ in range(config.num_hidden_layers)])
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, pixels_B3HW: Tensor, checkpoint: bool = False) -> Tensor:
        x = self.embeddings(pixels_B3HW)
        for layer in self.encoder.layers:
            x = _run(layer, checkpoint, x)
        return self.post_layernorm(x)


# --- visual abstractor ---


def _sincos(positions: Tensor, width: int) -> Tensor:
    """(n,) -> (n, width): first half sin, second half cos, frequency j is 10000^(-j / (width / 2))."""
    frequency = 10000.0 ** (-torch.arange(width // 2, dtype=torch.float64, device="cpu") / (width / 2))
    angle = positions.double()[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def query_positions(queries: int, width: int) -> Tensor:
    """(Q, D) float32 table of the queries' positions."""
    return _sincos(torch.arange(queries, device="cpu"), width).float()


def key_positions(grid: int, width: int) -> Tensor:
    """(1 + grid^2, D) float32 table: zeros for the class token, then [column, row] codes per grid cell."""
    code = _sincos(torch.arange(grid, device="cpu"), width // 2)
    cells = torch.cat([code.repeat(grid, 1), code.repeat_interleave(grid, dim=0)], dim=1)
    return torch.cat([torch.zeros(1, width, dtype=torch.float64, device="cpu"), cells]).float()


class AbstractorAttention(nn.Module):
    q_pos_embed: Tensor
    k_pos_embed: Tensor

    def __init__(self, config: AbstractorConfig, grid: int) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        # saved with the weights: the checkpoint's own, rounded values are the ones to use
        self.register_buffer("q_pos_embed", query_positions(config.num_learnable_queries, width))
        self.register_buffer("k_pos_embed", key_positions(grid, width))

    def forward(self, queries: Tensor, keys: Tensor) -> Tensor:
        q = self.query(queries + self.q_pos_embed)
        k = self.key(keys + torch.cat([self.q_pos_embed, self.k_pos_embed]))
        v = self.value(keys)
        q, k, v = (_split_heads(t, self.heads) for t in (q, k, v))
        return _attend(q, k, v)


class AbstractorMLP(nn.Module):
    def __init__(self, config: AbstractorConfig) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.w1 = nn.Linear(width, inner)
        self.w2 = nn.Linear(inner, width)
        self.w3 = nn.Linear(width, inner)
        self.ffn_ln = nn.LayerNorm(inner, eps=config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(self.ffn_ln(F.silu(self.w1(x)) * self.w3(x)))


class AbstractorOutput(nn.Module):
    def __init__(self, config: AbstractorConfig) -> None:
        super().__init__()
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=1e-5)
        self.mlp = AbstractorMLP(config)

    def forward(self, attended: Tensor, residual: Tensor) -> Tensor:
        y = residual + self.out_proj(attended)
        return y + self.mlp(self.norm2(y))


class AbstractorCrossAttention(nn.Module):
    def __init__(self, config: AbstractorConfig, grid: int) -> None:
        super().__init__()
        self.attention = AbstractorAttention(config, grid)
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=1e-5)
        self.normk = nn.LayerNorm(config.hidden_size, eps=1e-5)
        self.output = AbstractorOutput(config)

    def forward(self, queries: Tensor, image_tokens: Tensor) -> Tensor:
        n = self.norm1(queries)  # also the residual: not the un-normalised queries
        keys = torch.cat([n, self.normk(image_tokens)], dim=1)
        return self.output(self.attention(n, keys), n)


class AbstractorLayer(nn.Module):
    def __init__(self, config: AbstractorConfig, grid: int) -> None:
        super().__init__()
        self.crossattention = AbstractorCrossAttention(config, grid)

    def forward(self, queries: Tensor, image_tokens: Tensor) -> Tensor:
        return self.crossattention(queries, image_tokens)


class VisualAbstractor(nn.Module):
    """(B, N, D) image tokens -> (B, Q + 1, language width): projected queries, then the learned end token."""

    def __init__(self, config: AbstractorConfig, grid: int, out_width: int) -> None:
        super().__init__()
        width, count = config.hidden_size, config.num_learnable_queries
        self.query_embeds = nn.Parameter(torch.zeros(1, count, width))
        self.vit_eos = nn.Parameter(torch.zeros(1, 1, out_width))
        self.encoder = LayerStack([AbstractorLayer(config, grid) for _ in range(config.num_hidden_layers)])
        self.visual_fc = nn.Linear(width, out_width)

    def forward(self, image_tokens: Tensor, checkpoint: bool = False) -> Tensor:
        batch = image_tokens.shape[0]
        x = self.query_embeds.expand(batch, -1, -1)
        for layer in self.encoder.layers:
            x = _run(layer, checkpoint, x, image_tokens)
        return torch.cat([self.visual_fc(x), self.vit_eos.expand(batch, -1, -1)], dim=1)


# --- language model ---


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)


class Multiway(nn.Module):
    """The same layer twice: `multiway.0` for text tokens, `multiway.1` for the image's tokens [start, stop).

    The image's place is the same in every row, so slices do the work of a per-token choice.
    """

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.multiway = nn.ModuleList([make(), make()])

    def forward(self, x: Tensor, start: int, stop: int) -> Tensor:
        text, visual = self.multiway
        return torch.cat([text(x[:, :start]), visual(x[:, start:stop]), text(x[:, stop:])], dim=1)


def _rotate(x_BHSd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions, split-half convention: channel j pairs with channel j + d/2."""
    first, second = x_BHSd.chunk(2, dim=-1)
    return x_BHSd * cos + torch.cat([-second, first], dim=-1) * sin


class DecoderAttention(nn.Module):
    def __init__(self, config: QAlignConfig) -> None:
        super().__init__()
        width = config.hidden_size

        def linear() -> nn.Linear:
            return nn.Linear(width, width, bias=False)

        self.heads = config.num_attention_heads
        self.q_proj, self.o_proj = linear(), linear()
        self.k_proj, self.v_proj = Multiway(linear), Multiway(linear)

    def forward(self, x: Tensor, start: int, stop: int, cos: Tensor, sin: Tensor) -> Tensor:
        q = _rotate(_split_heads(self.q_proj(x), self.heads), cos, sin)
        k = _rotate(_split_heads(self.k_proj(x, start, stop), self.heads), cos, sin)
        v = _split_heads(self.v_proj(x, start, stop), self.heads)
        return self.o_proj(_attend(q, k, v, causal=True))


class DecoderMLP(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    def __init__(self, config: QAlignConfig) -> None:
        super().__init__()

        def norm() -> RMSNorm:
            return RMSNorm(config.hidden_size, config.rms_norm_eps)

        self.self_attn = DecoderAttention(config)
        self.mlp = DecoderMLP(config.hidden_size, config.intermediate_size)
        self.input_layernorm = Multiway(norm)
        self.post_attention_layernorm = Multiway(norm)

    def forward(self, x: Tensor, start: int, stop: int, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x, start, stop), start, stop, cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x, start, stop))


def rope_tables(config: QAlignConfig) -> tuple[Tensor, Tensor]:
    """cos and sin, (max_position_embeddings, head width) float32 each."""
    head = config.hidden_size // config.num_attention_heads
    frequency = 1.0 / config.rope_theta ** (
        torch.arange(0, head, 2, dtype=torch.float32, device="cpu") / head
    )
    positions = torch.arange(config.max_position_embeddings, dtype=torch.float32, device="cpu")
    angle = torch.outer(positions, frequency).repeat(1, 2)
    return angle.cos(), angle.sin()


class MultimodalDecoder(nn.Module):
    """Everything under the checkpoint's prefix `model.`; the final norm is left to the caller."""

    rope_cos: Tensor
    rope_sin: Tensor

    def __init__(self, config: QAlignConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([DecoderLayer(config) for _ in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.vision_model = VisionTower(config.vision)
        self.visual_abstractor = VisualAbstractor(config.abstractor, config.vision.grid, config.hidden_size)
        cos, sin = rope_tables(config)
        self.register_buffer("rope_cos", cos, persistent=False)
        self.register_buffer("rope_sin", sin, persistent=False)

    def forward(self, pixels_B3HW: Tensor, before: Tensor, after: Tensor, checkpoint: bool = False) -> Tensor:
        """Pixels and the ids before and after the image, (B or 1, n) each -> hidden states (B, S, D)."""
        batch = pixels_B3HW.shape[0]
        visual = self.visual_abstractor(self.vision_model(pixels_B3HW, checkpoint), checkpoint)
        text = [self.embed_tokens(ids).expand(batch, -1, -1) for ids in (before, after)]
        x = torch.cat([text[0], visual, text[1]], dim=1)
        start, stop = before.shape[1], before.shape[1] + visual.shape[1]
        cos, sin = (t[: x.shape[1]].to(x.dtype) for t in (self.rope_cos, self.rope_sin))
        for layer in self.layers:
            x = _run(layer, checkpoint, x, start, stop, cos, sin)
        return x
