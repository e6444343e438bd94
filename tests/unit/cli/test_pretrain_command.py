"""ubgen-pretrain: the recipe first, then what the command line overrides."""

import pytest

from ubgen.cli.pretrain import parse
from ubgen.core.errors import UserError


def test_options_override_the_recipe() -> None:
    given = parse(["--data", "d", "--recipe", "vit-s", "--lr", "0.002", "--augmentation.erasing", "0.1"])
    assert (given.config.model, given.config.epochs) == ("vit_small_patch16_224", 160)
    assert (given.config.lr, given.config.augmentation.erasing) == (0.002, 0.1)
    assert (given.data, given.val, given.recipe) == ("d", None, "vit-s")


def test_a_dataset_and_a_known_recipe_are_required() -> None:
    with pytest.raises(UserError, match="--data is missing"):
        parse([])
    with pytest.raises(UserError, match="one of miniature, miniature-vit, resnet50"):
        parse(["--data", "d", "--recipe", "sd15-imagenet1k"])
