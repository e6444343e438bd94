import pytest
import torch

from ubgen.rewards import Discriminator
from ubgen.train.state import DiscriminatorHealth


def test_the_accuracy_is_that_on_the_last_256_images() -> None:
    health = DiscriminatorHealth(Discriminator(4))
    for right in (0.0, 0.5, 1.0):
        health.judged(right, 128)
    assert health.accuracy() == 0.75
    again = DiscriminatorHealth(Discriminator(4))
    again.load_state_dict(health.state_dict())
    for it in (health, again):
        it.judged(0.0, 32)
    assert again.accuracy() == health.accuracy() == pytest.approx((0.5 * 128 + 128) / 288)


def test_directions_are_those_of_the_logit_now_and_at_the_start() -> None:
    torch.manual_seed(0)
    network, images = Discriminator(4, 8, "leaky_relu"), torch.randn(16, 4)
    health = DiscriminatorHealth(network)
    now, start = health.directions(network, images)
    assert torch.equal(now, start)
    network.head["cls"][2].weight.data.neg_()
    now, start = health.directions(network, images)
    assert torch.allclose(now, -start)
    step = 1e-3 * start
    rise = (network(images + step) - network(images)).mean().item()
    assert rise == pytest.approx(float(now @ step), rel=0.1)
