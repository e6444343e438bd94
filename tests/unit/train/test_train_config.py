import dataclasses

import pytest

from ubgen.core.config import load_recipe, to_dict
from ubgen.core.errors import UserError
from ubgen.train import GeneratorConfig, LossConfig, NetworkPaths, RolloutConfig, TrainConfig
from ubgen.train.config import accumulation, validate

CONFIG = TrainConfig(networks=NetworkPaths("sd", "clip", "qalign"), classes="imagenet1k")


@pytest.mark.parametrize("name", ["miniature", "miniature-eq8", "sd15-imagenet1k"])
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


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (dataclasses.replace(CONFIG, batch_size=0), "batch_size must be positive, not 0"),
        (dataclasses.replace(CONFIG, epochs=float("nan")), "epochs"),
        (dataclasses.replace(CONFIG, max_updates=-1), "max_updates"),
        (dataclasses.replace(CONFIG, prompt="a photo"), "prompt must contain"),
        (dataclasses.replace(CONFIG, losses=LossConfig(0, 0, 0)), "all weights of rewards are 0"),
        (dataclasses.replace(CONFIG, losses=LossConfig(1, -1, 0)), r"losses\.individual"),
        (dataclasses.replace(CONFIG, rollout=RolloutConfig(steps=4)), r"rollout\.grad_steps"),
        (dataclasses.replace(CONFIG, generator=GeneratorConfig(lora_rank=0)), "lora_rank"),
    ],
)
def test_senseless_values_are_named(config: TrainConfig, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        validate(config)


@pytest.mark.parametrize("term", ["class_mean", "class_spread"])
def test_the_class_level_terms_need_the_base_generators_images(term: str) -> None:
    classes = with_option(f"losses.{term}", 1.0)
    validate(classes)
    for name in ("warmup_updates", "warmup_epochs"):
        without = dataclasses.replace(classes.discriminator, **{name: 0})
        with pytest.raises(UserError, match=r"add --discriminator\.warmup-updates"):
            validate(dataclasses.replace(classes, discriminator=without))
        validate(dataclasses.replace(CONFIG, discriminator=without))


def test_the_class_level_terms_are_a_reward_and_the_trust_region_is_none() -> None:
    validate(dataclasses.replace(CONFIG, losses=LossConfig(0, 0, 0, class_mean=1.0)))
    with pytest.raises(UserError, match="all weights of rewards are 0"):
        validate(dataclasses.replace(CONFIG, losses=LossConfig(0, 0, 0, trust=1.0)))


def test_our_own_terms_are_off_in_the_papers_recipe() -> None:
    losses = load_recipe("sd15-imagenet1k", TrainConfig).losses
    assert (losses.class_mean, losses.class_spread, losses.trust) == (0, 0, 0)


@pytest.mark.parametrize(
    ("accumulate", "batch_size", "processes", "batches"), [(3, 4, 2, 3), ("auto", 4, 8, 1), ("auto", 4, 1, 8)]
)
def test_auto_accumulates_to_the_papers_batch(
    accumulate: int, batch_size: int, processes: int, batches: int
) -> None:
    config = dataclasses.replace(CONFIG, accumulate=accumulate, batch_size=batch_size)
    assert accumulation(config, processes) == batches


@pytest.mark.parametrize(("batch_size", "processes"), [(4, 3), (4, 16), (5, 1)])
def test_auto_has_no_answer_for_shares_that_do_not_fit(batch_size: int, processes: int) -> None:
    config = dataclasses.replace(CONFIG, accumulate="auto", batch_size=batch_size)
    with pytest.raises(
        UserError, match=rf"accumulate auto: {processes} process.* batches of {batch_size} .*32"
    ):
        accumulation(config, processes)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"warmup_until": 0.4}, r"warmup_until must lie in 0\.5 to 1, not 0\.4"),
        ({"warmup_until": 0.9, "warmup_updates": 0}, "needs a warm-up to go on with"),
        ({"warmup_limit": 0.5}, "warmup_limit must be at least 1"),
    ],
)
def test_a_warmup_without_an_end_is_refused(options: dict, reason: str) -> None:
    opponent = dataclasses.replace(CONFIG.discriminator, **options)
    with pytest.raises(UserError, match=reason):
        validate(dataclasses.replace(CONFIG, discriminator=opponent))


def with_option(name: str, value: object) -> TrainConfig:
    """CONFIG with the option of this dotted name changed."""
    table, _, field = name.rpartition(".")
    if not table:
        return dataclasses.replace(CONFIG, **{field: value})
    changed = dataclasses.replace(getattr(CONFIG, table), **{field: value})
    return dataclasses.replace(CONFIG, **{table: changed})


@pytest.mark.parametrize("player", ["generator", "discriminator"])
@pytest.mark.parametrize(
    ("option", "values", "wanted"),
    [
        ("lr", (0.0, -1e-5), "positive"),
        ("clip", (0.0, -0.1), "positive"),
        ("eps", (0.0, -1e-8), "positive"),
        ("weight_decay", (-0.01,), "0 or more"),
        ("betas", ((1.0, 0.9), (0.9, 1.0), (-0.1, 0.9)), "at least 0 and below 1"),
    ],
)
def test_an_optimiser_that_could_not_learn_is_refused(
    player: str, option: str, values: tuple, wanted: str
) -> None:
    for value in values:
        with pytest.raises(UserError, match=rf"{player}\.{option} must be {wanted}, not "):
            validate(with_option(f"{player}.{option}", value))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("discriminator.warmup_updates", -5),
        ("discriminator.warmup_epochs", -0.5),
        ("output.grid_every", -1),
        ("generator.lora_alpha", 0.0),
        ("generator.ema", 1.0),
        ("losses.class_queue", 2),
        ("seed", 2**63),
    ],
)
def test_numbers_out_of_range_are_named(name: str, value: float) -> None:
    with pytest.raises(UserError, match=rf"^{name} must be .*, not {value}"):
        validate(with_option(name, value))


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_no_number_may_be_nan_or_infinite(number: float) -> None:
    names = [name for name, value in options(to_dict(CONFIG)) if isinstance(value, float)]
    assert {"epochs", "rollout.guidance", "losses.entire", "generator.clip", "discriminator.slope"} <= {
        *names
    }
    for name in names:
        with pytest.raises(UserError, match=rf"^{name} must be a finite number"):
            validate(with_option(name, number))
    with pytest.raises(UserError, match=r"^generator\.betas must be a finite number"):
        validate(with_option("generator.betas", (0.9, number)))


def options(values: dict, prefix: str = "") -> list[tuple[str, object]]:
    found: list[tuple[str, object]] = []
    for name, value in values.items():
        found += options(value, f"{prefix}{name}.") if isinstance(value, dict) else [(prefix + name, value)]
    return found


def test_zero_is_allowed_where_it_switches_off() -> None:
    for name in ("discriminator.warmup_updates", "output.grid_every", "generator.weight_decay"):
        validate(with_option(name, 0))
