from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from ubgen.core.classes import load_classes
from ubgen.core.config import load_recipe
from ubgen.train import TrainConfig
from ubgen.train.players import load_players
from ubgen.train.threads import gradients_on_one_thread


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def gradients(network: nn.Module, images: Tensor, threads: int) -> list[Tensor]:
    torch.set_num_threads(threads)
    network.zero_grad()
    network(images).square().sum().backward()
    assert torch.get_num_threads() == threads
    return [parameter.grad.clone() for parameter in network.parameters()]


def test_the_gradients_of_convolutions_have_the_same_bits_on_two_threads() -> None:
    """At the sizes of the miniature's rollout: a LoRA on the projection into a transformer block."""
    torch.manual_seed(0)
    lora = nn.Sequential(nn.Conv2d(64, 64, 1, bias=False), nn.Conv2d(64, 64, 1, bias=False))
    images = torch.randn(32, 64, 8, 8)
    gradients_on_one_thread(lora)
    one = gradients(lora, images, 1)
    for threads in (2, 4, 2):
        for expected, found in zip(one, gradients(lora, images, threads), strict=True):
            assert torch.equal(expected, found)


def test_texts_have_the_same_bits_on_two_threads() -> None:
    """The miniature's; its CLIP rounds them otherwise where it uses two threads."""
    config = load_recipe("miniature", TrainConfig)
    config = replace(config, losses=replace(config.losses, quality=0.0, log_unused=False))
    classes, texts = load_classes(config.classes), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        players = load_players(config, classes, torch.device("cpu"))
        assert torch.get_num_threads() == threads
        assert players.adversary is not None
        texts.append((players.descriptions_ND, players.prompts_NSD, players.adversary.names_ND))
    for one, two in zip(*texts, strict=True):
        assert torch.equal(one, two)
