"""The recipes are Table 6's, and what they build is timm's: schedule, weight decay, mixup, moving average."""

import math
import random
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from timm.data import Mixup
from timm.optim import param_groups_weight_decay
from torch import nn

from ubgen.core.config import load_recipe
from ubgen.core.errors import UserError
from ubgen.pretrain import PretrainConfig
from ubgen.pretrain.config import passes, validate
from ubgen.pretrain.state import (
    MovingAverage,
    build_mixup,
    build_model,
    build_optimizer,
    build_scheduler,
    build_state,
    seed_update,
    update,
)

TABLE_6 = {
    "resnet50": ("resnet50", 120, 12, 2048),
    "vit-s": ("vit_small_patch16_224", 160, 16, 2048),
    "resnet50-in100": ("resnet50", 120, 12, 512),
}


def recipe(name: str) -> PretrainConfig:
    return load_recipe(name, PretrainConfig, "pretrain")


@pytest.mark.parametrize("name", TABLE_6)
def test_the_recipes_are_table_6(name: str) -> None:
    config = recipe(name)
    assert (config.model, config.epochs, config.warmup_epochs, config.batch_size) == TABLE_6[name]
    assert (config.lr, config.betas, config.min_lr, config.weight_decay) == (1e-3, (0.9, 0.999), 1e-6, 0.05)
    assert (config.mixup, config.cutmix, config.mix_switch, config.label_smoothing) == (0.8, 1.0, 0.5, 0.1)
    assert (config.drop_path, config.ema_decay, config.image_size, config.crop_ratio) == (
        0.1,
        0.9999,
        224,
        0.875,
    )
    assert config.augmentation.rand_augment == "rand-m9-mstd0.5-inc1"
    assert config.augmentation.erasing == 0.25


@pytest.mark.parametrize("name", [*TABLE_6, "miniature", "miniature-vit"])
def test_every_recipe_is_valid(name: str) -> None:
    validate(recipe(name))
    assert timm.is_model(recipe(name).model)


def test_the_learning_rate_is_linear_then_half_a_cosine() -> None:
    """ConvNeXt's curve, for each update."""
    config = PretrainConfig(model="test_resnet", epochs=10, warmup_epochs=2, lr=1e-3, min_lr=1e-6)
    optimizer = build_optimizer(config, build_model(config, 4))
    scheduler = build_scheduler(config, optimizer, 7)
    found = []
    for done in range(70):
        scheduler.step_update(done)
        found.append(optimizer.param_groups[0]["lr"])
    warmup = [1e-3 * i / 14 for i in range(14)]
    cosine = [1e-6 + 0.5 * (1e-3 - 1e-6) * (1 + math.cos(math.pi * i / 56)) for i in range(56)]
    assert found == pytest.approx([*warmup, *cosine], rel=1e-12)


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_weight_decay_spares_what_timm_spares(name: str) -> None:
    config = PretrainConfig(model=name, image_size=160)
    model = build_model(config, 4)
    expected = param_groups_weight_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay() if name == "test_vit" else ())  # fmt: skip # noqa: E501
    groups = build_optimizer(config, model).param_groups

    def decays(groups: list[dict]) -> dict[int, float]:
        return {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}

    found = decays(groups)
    assert found == decays(expected)
    assert all((found[id(p)] == 0) == (p.ndim <= 1 or n in ("pos_embed", "cls_token", "reg_token")) for n, p in model.named_parameters())  # fmt: skip # noqa: E501


def test_mixup_is_timms() -> None:
    config = PretrainConfig()
    ours = build_mixup(config, 10)
    theirs = Mixup(0.8, 1.0, prob=1.0, switch_prob=0.5, mode="batch", label_smoothing=0.1, num_classes=10)
    assert ours is not None
    for seed in range(20):
        images, labels = torch.randn(6, 3, 8, 8), torch.randint(10, (6,))
        np.random.seed(seed)
        expected = theirs(images.clone(), labels)
        np.random.seed(seed)
        found = ours(images.clone(), labels)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert torch.allclose(found[1].sum(1), torch.ones(6))
    assert build_mixup(replace(config, mixup=0, cutmix=0), 10) is None


@pytest.mark.parametrize(("updates", "mode", "warm"), [(29_640, "auto", True), (75_000, "auto", False), (10, "off", False)])  # fmt: skip # noqa: E501
def test_the_moving_average_follows_its_rule(updates: int, mode: str, warm: bool) -> None:
    config = PretrainConfig(ema_warmup=mode)  # type: ignore[arg-type]
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    average = MovingAverage(config, model, updates)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    for done in range(1, 40):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
            model(torch.randn(5, 3))
        average.update(model, done)
        decay = min(0.9999, (1 + done) / (10 + done)) if warm else 0.9999
        assert average.decay(done) == pytest.approx(decay, rel=1e-12)
        for name, value in model.state_dict().items():
            kept = decay * expected[name] + (1 - decay) * value if value.is_floating_point() else value
            expected[name] = kept.clone()
    assert all(
        torch.allclose(value, expected[name], atol=1e-5) for name, value in average.model.state_dict().items()
    )
    assert min(0.9999, (1 + 10**6) / (10 + 10**6)) == average.decay(10**6)


@pytest.mark.parametrize("processes", [1, 2, 3, 5, 8, 16, 64])
def test_the_batch_is_cut_for_any_number_of_processes(processes: int) -> None:
    config = PretrainConfig(batch_size=processes * 120, micro_batch=32)
    steps, each = passes(config, processes)
    assert steps * each * processes == config.batch_size
    assert each <= 32
    assert each % 2 == 0
    assert passes(PretrainConfig(), 8) == (2, 128)


@pytest.mark.parametrize(("batch", "processes"), [(2048, 3), (6, 2), (5, 1), (2, 2)])
def test_a_batch_that_cannot_be_cut_is_refused(batch: int, processes: int) -> None:
    with pytest.raises(UserError, match=f"batch_size {batch} cannot be cut"):
        passes(PretrainConfig(batch_size=batch), processes)


@pytest.mark.parametrize(
    "change",
    [
        {"lr": 0.0}, {"lr": math.inf}, {"drop_path": 1.0}, {"mixup": -1.0}, {"ema_decay": 1.0}, {"crop_ratio": 0.0},
        {"mix_switch": 2.0}, {"warmup_epochs": 120}, {"batch_size": 0}, {"threads": -1},
    ],
)  # fmt: skip
def test_values_that_make_no_sense_are_refused(change: dict) -> None:
    with pytest.raises(UserError, match=next(iter(change))):
        validate(replace(PretrainConfig(), **change))


def test_accumulation_gives_the_gradients_of_the_whole_batch() -> None:
    """Without batch statistics and mixing, parts of a batch and the whole are one update, to float32's rounding."""
    config = PretrainConfig(
        model="test_vit", image_size=32, patch_size=8, precision="no", mixup=0, cutmix=0, drop_path=0, warmup_epochs=0,
        channels_last=False,
    )  # fmt: skip
    images, labels = torch.randn(8, 3, 32, 32), torch.arange(8) % 4
    weights = []
    for parts in (1, 4):
        state = build_state(config, 4, 10, torch.device("cpu"), 1)
        batches = [
            {"images": i, "labels": k} for i, k in zip(images.chunk(parts), labels.chunk(parts), strict=True)
        ]
        state.optimizer = torch.optim.SGD(state.model.parameters(), lr=0.1)
        update(state, batches, 0, 0)
        weights.append(nn.utils.parameters_to_vector(state.model.parameters()).detach())
    assert torch.allclose(*weights, atol=1e-5)


def test_an_update_draws_from_its_own_seed() -> None:
    def draws(update: int, rank: int) -> tuple:
        seed_update(3, update, rank)
        return random.random(), np.random.rand(), torch.rand(()).item()

    assert draws(5, 0) == draws(5, 0)
    assert len({draws(update, rank) for update in range(3) for rank in range(3)}) == 9
