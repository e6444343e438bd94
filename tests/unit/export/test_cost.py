"""What a call costs, from the shapes alone."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ubgen.diffusion import StableDiffusion, load_stable_diffusion
from ubgen.export.cost import count_flops, peak_activations
from ubgen.export.networks import ClipImage, ClipText, TextEncoder, UNet, VaeDecoder
from ubgen.rewards import Clip


class Block(nn.Module):
    """A convolution, two linear layers in a container, attention, and an elementwise end."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.stack = nn.ModuleList([nn.Linear(8, 16), nn.Linear(16, 8)])

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.conv(x).flatten(2).transpose(1, 2)
        for layer in self.stack:
            x = layer(x)
        return F.scaled_dot_product_attention(x, x, x, attn_mask=mask).sigmoid()


INPUTS = {"x": torch.rand(2, 3, 5, 4), "mask": torch.ones(20, 20, dtype=torch.bool)}
CONVOLUTION, LINEAR, ATTENTION = 2 * 2 * 20 * 8 * 27, 2 * 2 * 20 * 8 * 16, 2 * 2 * 2 * 20 * 20 * 8


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_counts_are_those_of_the_shapes(device):
    flops = count_flops(Block().to(device), {name: t.to(device) for name, t in INPUTS.items()})
    assert flops == {
        "": CONVOLUTION + 2 * LINEAR + ATTENTION,
        "conv": CONVOLUTION,
        "stack": 2 * LINEAR,
        "stack.0": LINEAR,
        "stack.1": LINEAR,
    }


def test_a_container_counts_its_children_once_whatever_lies_between():
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleDict({"blocks": nn.ModuleList([Block(), Block()])})

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            first, second = self.parts["blocks"]
            return first(x, mask) + second(x, mask)

    flops, one = count_flops(Outer(), INPUTS), CONVOLUTION + 2 * LINEAR + ATTENTION
    assert flops["parts"] == flops["parts.blocks"] == flops[""] == 2 * one
    assert flops["parts.blocks.0"] == one
    assert flops["parts.blocks.0.stack"] == 2 * LINEAR


def test_the_network_stays_as_it_was():
    block = Block()
    before = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    count_flops(block, INPUTS)
    assert all(torch.equal(tensor, before[name]) for name, tensor in block.state_dict().items())
    assert block(**INPUTS).shape == (2, 20, 8)


@pytest.fixture(scope="module")
def sd() -> StableDiffusion:
    return load_stable_diffusion("ubgen:miniature/weights/stable-diffusion")


def test_every_network_of_an_engine_can_be_counted_and_costs_in_proportion_to_the_batch(sd):
    clip = Clip.load("ubgen:miniature/weights/clip")
    width = sd.text_encoder.config.hidden_size

    def costs(batch: int) -> list[int]:
        latents, pixels = (
            torch.rand(batch, *sd.latent_shape()),
            torch.zeros(batch, 64, 64, 3, dtype=torch.uint8),
        )
        ids = torch.zeros(batch, 16, dtype=torch.int64)
        guided = {
            "latents": latents,
            "timestep": torch.ones(batch),
            "cond": torch.rand(batch, 16, width),
            "uncond": torch.rand(1, 16, width),
            "guidance": torch.ones(1),
        }
        calls = [
            (TextEncoder(sd.text_encoder), {"input_ids": ids}),
            (UNet(sd.unet), guided),
            (VaeDecoder(sd.vae), {"latents": latents}),
            (ClipImage(clip), {"pixels": pixels}),
            (ClipText(clip), {"tokens": clip.tokenizer(["a"] * batch)}),
        ]
        return [count_flops(module, inputs)[""] for module, inputs in calls]

    one, three = costs(1), costs(3)
    assert min(one) > 1_000_000
    assert three == [3 * flops for flops in one]


class Chain(nn.Module):
    """Each result is dropped when the next is there; attention's matrix of scores is never whole."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(4, 1024)

    def forward(self, x: Tensor) -> Tensor:
        x = self.wide(x)
        x = x + 1
        x = x * 2
        q = x[:, None]
        return nn.functional.scaled_dot_product_attention(q, q, q)[:, 0, :, :4].clone()


def test_peak_activations() -> None:
    chain = Chain().to("meta")
    peak, output = peak_activations(chain, {"x": torch.empty(8, 2048, 4, device="meta")})
    wide, narrow = 8 * 2048 * 1024 * 4, 8 * 2048 * 4 * 4
    assert output.shape == (8, 2048, 4)
    # attention's input and output, and the first input and the last output that are still there
    assert peak == 2 * wide + 2 * narrow


def test_scores_that_are_kept_count_before_and_after_the_softmax() -> None:
    chain, inputs = Chain().to("meta").half(), {"x": torch.empty(8, 2048, 4, device="meta", dtype=torch.half)}
    fused, _ = peak_activations(chain, inputs)
    asked = list[tuple[tuple[int, ...], bool]]()

    def keeps(query: Tensor, masked: bool) -> bool:
        asked.append((tuple(query.shape), masked))
        return True

    whole, _ = peak_activations(chain, inputs, keeps)
    assert asked == [((8, 1, 2048, 1024), False)]
    wide, scores = 8 * 2048 * 1024 * 2, 8 * 2048 * 2048 * 2
    assert fused == 2 * wide + 2 * 8 * 2048 * 4 * 2
    assert (
        whole == wide + 2 * scores + 8 * 2048 * 4 * 2
    )  # with the input, and before attention's output is there
