"""Q-Align as it is compiled: from 8-bit images to scores, without the work that no score depends on."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ubgen.core.errors import UserError
from ubgen.rewards import QAlign, qalign_preprocess
from ubgen.rewards.qalign_model import DecoderLayer, Multiway


class QAlignScorer(nn.Module):
    """pixels (B,H,W,3) uint8 -> score (B,) float32 in [1, 5], as `QAlign.score`; preprocessing is inside.

    The text before the image sees nothing but itself (attention is causal): its keys and values are computed
    here, once, and kept as constants. The last layer is computed at the last position only, apart from its keys
    and values. Of the head the rows of the level words are kept, of the embedding the text after the image. At 7B
    sizes this is 88 % of the operations of a forward pass with the whole prompt and the whole head.

    Shares the weights of `qalign`, in their dtype and on their device ("meta" too). For inference: the constants
    have no gradient and don't follow a later change of the weights. H and W are fixed by what it is traced on;
    the batch is free. UserError when the prompt does not fit the vocabulary.
    """

    after: Tensor
    cos: Tensor
    sin: Tensor
    mask: Tensor
    level_weights: Tensor

    @torch.no_grad()
    def __init__(self, qalign: QAlign) -> None:
        super().__init__()
        network, sizes = qalign.model, qalign.sizes
        before, after = _prompt(qalign)
        prefix, image = before.shape[1], sizes.abstractor.num_learnable_queries + 1
        length = prefix + image + after.shape[1]
        cos, sin = (table[:length].to(before) for table in (network.rope_cos, network.rope_sin))

        self.image_size = qalign.image_size
        self.vision_model = network.vision_model
        self.visual_abstractor = network.visual_abstractor
        folded = _fold(network.layers, before, cos[:prefix], sin[:prefix])
        self.layers = nn.ModuleList(
            FoldedLayer(layer, keys, values, image, last=index == len(network.layers) - 1)
            for index, (layer, keys, values) in enumerate(folded)
        )
        self.norm = network.norm
        rows = qalign.lm_head.weight[qalign.level_ids.to(before.device)]
        self.head = nn.Linear(rows.shape[1], rows.shape[0], bias=False, device="meta")
        self.head.weight = nn.Parameter(rows, requires_grad=False)
        # added to the attention's logits: no position sees later ones
        mask = torch.full((length - prefix, length), -torch.inf, dtype=before.dtype, device=before.device)
        self.register_buffer("after", after)
        self.register_buffer("cos", cos[prefix:].clone())
        self.register_buffer("sin", sin[prefix:].clone())
        self.register_buffer("mask", mask.triu(prefix + 1))
        self.register_buffer("level_weights", qalign.level_weights.to(before.device))

    def forward(self, pixels: Tensor) -> Tensor:
        images_B3HW = pixels.float().permute(0, 3, 1, 2) / 255  # in this order: TensorRT permutes no bytes
        square = images_B3HW.shape[2] == images_B3HW.shape[3]
        return self.score_pixels(
            qalign_preprocess(images_B3HW, self.image_size, fit="squash" if square else "pad")
        )

    def score_pixels(self, pixel_values: Tensor) -> Tensor:
        """Score (B,) float32 of normalised pixels (B, 3, image_size, image_size)."""
        dtype = self.vision_model.embeddings.patch_embed.weight.dtype
        visual = self.visual_abstractor(self.vision_model(pixel_values.to(dtype)))
        x = torch.cat([visual, self.after.to(visual.dtype).expand(visual.shape[0], -1, -1)], dim=1)
        for layer in self.layers:
            x = layer(x, self.cos, self.sin, self.mask)
        logits = self.head(self.norm(x[:, -1]))
        # not a sum over the products: ONNX Runtime's sums depend on where in memory a row begins, and an image's
        # score would change in the last bit with its place in the batch
        return torch.softmax(logits.float(), dim=-1) @ self.level_weights.float()


class FoldedLayer(nn.Module):
    """A decoder layer for the image's tokens and the text after them: (B, R, D) -> (B, R, D).

    `keys` and `values` (1, heads, P, head width) belong to the P positions before. The `last` layer returns
    (B, 1, D), its last position.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, layer: DecoderLayer, keys: Tensor, values: Tensor, image: int, last: bool) -> None:
        super().__init__()
        self.image, self.last = image, last
        self.self_attn, self.mlp = layer.self_attn, layer.mlp
        self.input_layernorm = layer.input_layernorm
        self.post_attention_layernorm = layer.post_attention_layernorm
        self.register_buffer("keys", keys)
        self.register_buffer("values", values)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        attention, image = self.self_attn, self.image
        n = _by_modality(self.input_layernorm, x, image)
        k = _rotate(_heads(_by_modality(attention.k_proj, n, image), attention.heads), cos, sin)
        v = _heads(_by_modality(attention.v_proj, n, image), attention.heads)
        if self.last:
            image = max(0, image + 1 - x.shape[1])  # 1 when the prompt ends with the image
            x, n, cos, sin = x[:, -1:], n[:, -1:], cos[-1:], sin[-1:]
        q = _rotate(_heads(attention.q_proj(n), attention.heads), cos, sin)
        k, v = (
            torch.cat([constant.expand(x.shape[0], -1, -1, -1), own], dim=2)
            for constant, own in ((self.keys, k), (self.values, v))
        )
        # not is_causal: with fewer queries than keys it would count from the first key
        visible = None if self.last else mask.to(q.dtype)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
        x = x + attention.o_proj(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(_by_modality(self.post_attention_layernorm, x, image))


def _prompt(qalign: QAlign) -> tuple[Tensor, Tensor]:
    """(1, n, D) embeddings of the text before and after the image."""
    ids, place, vocabulary = qalign.prompt_ids, qalign.prompt_place, qalign.sizes.vocab_size
    if max(qalign.sizes.scoring.prompt_ids) >= vocabulary:
        raise UserError(
            f"Q-Align config: the prompt needs a larger vocabulary than {vocabulary}; set scoring.prompt_ids"
        )
    embed = qalign.model.embed_tokens
    before, after = (
        embed(part.to(embed.weight.device)).detach() for part in (ids[:, :place], ids[:, place + 1 :])
    )
    return before, after


def _fold(
    layers: nn.ModuleList, x: Tensor, cos: Tensor, sin: Tensor
) -> Iterator[tuple[DecoderLayer, Tensor, Tensor]]:
    """Every layer with the rotated keys and the values (1, heads, P, head width) of the text `x` (1, P, D)."""
    text = x.shape[1]
    for layer in layers:
        assert isinstance(layer, DecoderLayer)
        attention = layer.self_attn
        n = layer.input_layernorm(x, text, text)
        keys = _rotate(_heads(attention.k_proj(n, text, text), attention.heads), cos, sin)
        yield layer, keys, _heads(attention.v_proj(n, text, text), attention.heads).clone()
        x = layer(x, text, text, cos, sin)


def _by_modality(pair: Multiway, x: Tensor, image: int) -> Tensor:
    """`x` (B, R, D) through the pair: its first `image` positions are visual, the others text."""
    text, visual = pair.multiway
    if image in (0, x.shape[1]):  # an empty part would stay in an exported graph
        return visual(x) if image else text(x)
    return torch.cat([visual(x[:, :image]), text(x[:, image:])], dim=1)


def _heads(x_BRD: Tensor, heads: int) -> Tensor:
    return x_BRD.unflatten(-1, (heads, -1)).transpose(1, 2)


def _rotate(x_BHRd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions, split-half convention."""
    first, second = x_BHRd.chunk(2, dim=-1)
    return x_BHRd * cos + torch.cat([-second, first], dim=-1) * sin
