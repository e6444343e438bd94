import dataclasses

import pytest

from ubgen.config import load_recipe
from ubgen.errors import UserError
from ubgen.train import GeneratorConfig, LossConfig, NetworkPaths, RolloutConfig, TrainConfig
from ubgen.train.config import validate

CONFIG = TrainConfig(networks=NetworkPaths("sd", "clip", "qalign"), classes="imagenet1k")


@pytest.mark.parametrize("name", ["miniature", "sd15-imagenet1k", "sd15-imagenet100"])
def test_shipped_recipes_are_valid(name: str) -> None:
    validate(load_recipe(name, TrainConfig))


def test_the_paper_recipe_is_table_5_and_the_defaults() -> None:
    recipe = load_recipe("sd15-imagenet1k", TrainConfig)
    assert (recipe.generator.lr, recipe.generator.betas, recipe.generator.clip) == (2e-5, (0.9, 0.999), 0.1)
    assert (recipe.discriminator.lr, recipe.discriminator.clip) == (1e-5, 1.0)
    assert recipe.discriminator.betas == (0.0, 0.999)
    assert (recipe.generator.lora_rank, recipe.generator.lora_alpha) == (128, None)
    assert (recipe.rollout.steps, recipe.rollout.grad_steps, recipe.rollout.guidance) == (50, 5, 2.0)
    assert (recipe.batch_size, recipe.epochs, recipe.precision) == (4, 3.0, "fp16")
    assert recipe.losses == LossConfig(1.0, 1.0, 0.1, log_unused=False)
    defaults = dataclasses.replace(
        CONFIG, networks=recipe.networks, losses=recipe.losses, output=recipe.output
    )
    assert recipe == defaults


def test_the_imagenet100_recipe_differs_in_the_classes_only() -> None:
    small, large = (load_recipe(f"sd15-imagenet{n}", TrainConfig) for n in ("100", "1k"))
    assert small.classes == "imagenet100"
    assert dataclasses.replace(small, classes=large.classes, output=large.output) == large


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (dataclasses.replace(CONFIG, batch_size=0), "batch_size must be positive, not 0"),
        (dataclasses.replace(CONFIG, epochs=float("nan")), "epochs"),
        (dataclasses.replace(CONFIG, max_updates=-1), "max_updates"),
        (dataclasses.replace(CONFIG, prompt="a photo"), "prompt must contain"),
        (dataclasses.replace(CONFIG, losses=LossConfig(0, 0, 0)), "all three weights are 0"),
        (dataclasses.replace(CONFIG, losses=LossConfig(1, -1, 0)), r"losses\.individual"),
        (dataclasses.replace(CONFIG, rollout=RolloutConfig(steps=4)), r"rollout\.grad_steps"),
        (dataclasses.replace(CONFIG, generator=GeneratorConfig(lora_rank=0)), "lora_rank"),
    ],
)
def test_senseless_values_are_named(config: TrainConfig, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        validate(config)
