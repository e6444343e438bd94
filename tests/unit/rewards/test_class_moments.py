"""The class-level terms: worked by hand, against finite differences, and on features whose bias is known."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ubgen.rewards import (
    ClassMoments,
    Discriminator,
    class_mean_loss,
    class_spread_loss,
    discriminator_loss,
)


def world(count: int, tied: float, classes: int = 4, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Texts (classes, 32); features (count, 32) of images that show their class and one of `classes` backgrounds,
    with probability `tied` the background of their class, else any; and their classes."""
    draw = torch.Generator().manual_seed(seed)
    label = torch.arange(count) % classes
    any_scene = torch.randint(classes, (count,), generator=draw)
    scene = torch.where(torch.rand(count, generator=draw) < tied, label, any_scene)
    axes = torch.eye(32)
    features = axes[-1] + axes[label] + axes[classes + scene] + 0.1 * torch.randn(count, 32, generator=draw)
    return axes[:classes] + 0.3 * axes[-1], 3 * features, label


def fitted(images: Tensor, texts: Tensor, labels: Tensor, queue: int = 24) -> ClassMoments:
    moments = ClassMoments(texts, queue)
    moments.collect(images, labels)
    moments.fit()
    return moments


def test_moments_worked_by_hand() -> None:
    """One image, three residuals along two directions: means 2 and 0; variances 4 and 1."""
    residuals, variance = torch.tensor([[[0.0, -1.0], [2.0, 0.0], [4.0, 1.0]]]), torch.tensor([8.0, 0.5])
    assert class_mean_loss(residuals, variance) == pytest.approx((4 / 8 + 0 / 0.5) / 2 - 1 / 3)
    assert class_spread_loss(residuals, variance) == pytest.approx(((1 - 4 / 8) + 0) / 2)


def test_an_image_is_the_last_of_its_queue_and_speaks_for_all_of_it() -> None:
    """The gradient is n times the slope of the loss, by finite differences in double precision."""
    texts, images, labels = (t.double() if t.is_floating_point() else t for t in world(400, 0.9))
    moments = fitted(images.float(), texts.float(), labels, queue=6)
    moments._fitted = {k: v.double() if v.is_floating_point() else v for k, v in moments._fitted.items()}
    variance, queue = moments._fitted["variance"], moments._fitted["queue"]
    own, labels = torch.randn(3, len(variance), dtype=torch.float64) * variance.sqrt(), labels[:3]

    def loss(own: Tensor) -> Tensor:
        joined = torch.cat([queue[labels], own[:, None]], dim=1)
        return (class_mean_loss(joined, variance) + 0.7 * class_spread_loss(joined, variance)).mean()

    slopes = torch.zeros_like(own)
    for place in range(own.numel()):
        step = torch.zeros(own.numel(), dtype=torch.float64)
        step[place] = 1e-6
        step = step.view_as(own)
        slopes.view(-1)[place] = (loss(own + step) - loss(own - step)) / 2e-6
    moments.residuals = lambda features: features  # type: ignore[method-assign]
    own.requires_grad_(True)
    mean, spread = moments.losses(own, labels)
    torch.testing.assert_close((mean + 0.7 * spread).detach(), loss(own.detach()))
    (mean + 0.7 * spread).backward()
    torch.testing.assert_close(own.grad, 6 * slopes, rtol=1e-6, atol=1e-8)


def test_gradient_through_the_features() -> None:
    texts, images, labels = world(400, 0.9)
    moments = fitted(images, texts, labels)
    feature = images[:1].clone().requires_grad_(True)
    moments.losses(feature, labels[:1])[0].backward()
    assert feature.grad is not None
    # scaling a feature changes nothing, and neither do the texts' directions
    assert F.cosine_similarity(feature.grad, images[:1]).abs() < 1e-3
    torch.testing.assert_close(moments.residuals(5 * images), moments.residuals(images))
    basis = moments._fitted["basis"]
    torch.testing.assert_close(basis.T @ basis, torch.eye(basis.shape[1]), rtol=0, atol=1e-5)
    assert ((texts - texts.mean(0)) @ basis).abs().max() < 1e-5


def test_it_sees_what_the_discriminator_cannot() -> None:
    """The same classes and backgrounds, put together at random: Eq. 5's loss moves by less than a hundredth of itself;
    the class-level one loses nine tenths."""
    texts, images, labels = world(4000, 0.9)
    moments = fitted(images, texts, labels, queue=500)
    tied, _ = moments.losses(images, labels)
    axes = torch.eye(32)
    scene_part = images[:, 4:8] @ axes[4:8]
    draw = torch.Generator().manual_seed(1)
    exchanged = images - scene_part + scene_part[torch.randperm(len(images), generator=draw)]
    moments.push(exchanged, labels)
    free, _ = moments.losses(exchanged, labels)
    assert tied > 0.2  # of 8 directions 3 are backgrounds, the others noise
    assert abs(free) < 0.1 * tied
    torch.manual_seed(0)
    discriminator = Discriminator(32, hidden=64)
    before, after = (discriminator_loss(discriminator, each, texts).item() for each in (images, exchanged))
    assert before == pytest.approx(after, rel=1e-2)


def test_exchanging_whole_backgrounds_between_classes_gains_nothing() -> None:
    """Green for brick: another background, and as much bias as before."""
    texts, images, labels = world(4000, 0.9)
    moments = fitted(images, texts, labels)
    before, _ = moments.losses(images, labels)
    exchanged = images.clone()
    exchanged[:, 4:8] = images[:, 4:8].roll(1, dims=1)
    moments.push(exchanged, labels)
    after, _ = moments.losses(exchanged, labels)
    assert after > 0.9 * before


def test_zero_in_expectation_where_backgrounds_are_free() -> None:
    """The base's own residuals, independent of the class: the mean over 60 queues is 0 within 3 standard errors."""
    texts, pool, pool_labels = world(4000, 0.0)
    moments = fitted(pool, texts, pool_labels)
    values = []
    for seed in range(1, 61):
        _, images, labels = world(24 * 4, 0.0, seed=seed)
        moments.push(images[:-4], labels[:-4])
        values.append(moments.losses(images[-4:], labels[-4:])[0])
    found = torch.stack(values)
    assert found.mean().abs() < 3 * found.std() / 60**0.5
    assert found.std() / 60**0.5 < 0.01


def test_spread_asks_for_the_variety_of_all_classes_together() -> None:
    texts, images, labels = world(4000, 0.0)
    moments = fitted(images, texts, labels)
    _, as_it_is = moments.losses(images, labels)
    narrow = images.clone()
    narrow[:, 4:] = images[:, 4:].mean(0) + 0.5 * (images[:, 4:] - images[:, 4:].mean(0))
    moments.push(narrow, labels)
    _, halved = moments.losses(narrow, labels)
    assert as_it_is < 0.15
    assert halved > 0.5


def test_normal_residuals_leave_what_the_docstring_says() -> None:
    draw = torch.Generator().manual_seed(0)
    residuals = torch.randn(20000, 24, 4, generator=draw)
    assert class_spread_loss(residuals, torch.ones(4)).mean() == pytest.approx(0.12, abs=0.005)
    assert class_mean_loss(residuals, torch.ones(4)).mean() == pytest.approx(0, abs=1e-3)


def test_a_class_without_a_full_queue_counts_as_zero() -> None:
    texts, images, labels = world(4 * 10, 0.9)
    moments = fitted(images, texts, labels, queue=24)  # 10 images of each class
    assert moments.losses(images, labels) == (0, 0)
    moments.push(images[labels == 0].repeat(2, 1), labels[labels == 0].repeat(2))
    mean, _ = moments.losses(images[:2], labels[:2])  # classes 0 and 1
    assert mean == moments.losses(images[:1], labels[:1])[0] / 2
    assert mean > 0.05


def test_parts_of_a_batch_give_the_whole() -> None:
    """So processes and accumulated parts need no exchange."""
    texts, images, labels = world(400, 0.9)
    moments = fitted(images, texts, labels)
    whole = torch.stack(moments.losses(images[:8], labels[:8]))
    parts = [torch.stack(moments.losses(images[i : i + 2], labels[i : i + 2])) for i in range(0, 8, 2)]
    torch.testing.assert_close(torch.stack(parts).mean(0), whole)


def test_state_goes_on_in_the_pool_and_after_it() -> None:
    texts, images, labels = world(400, 0.9)
    whole, first, second = (ClassMoments(texts) for _ in range(3))
    for moments in (whole, first):
        moments.collect(images[:200], labels[:200])
    second.load_state_dict(first.state_dict())
    for moments in (whole, second):
        moments.collect(images[200:], labels[200:])
        moments.fit()
        moments.push(images[:7], labels[:7])
    third = ClassMoments(texts)
    third.load_state_dict(second.state_dict())
    for moments in (whole, third):
        moments.push(images[7:9], labels[7:9])
    assert third.fitted
    assert whole.losses(images, labels) == third.losses(images, labels)


def test_a_thousand_classes_leave_a_residual() -> None:
    """More texts than dimensions span everything: only their main directions are taken away."""
    draw = torch.Generator().manual_seed(0)
    texts, images = torch.randn(100, 32, generator=draw), torch.randn(200, 32, generator=draw)
    moments = fitted(images, texts, torch.arange(200) % 100, queue=3)
    assert moments._fitted["basis"].shape == (32, 8)
    assert 0.3 < moments.held < 1
