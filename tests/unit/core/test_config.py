"""Recipes: what a TOML file may say, and the message for each thing that it may not."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from ubgen.core.config import engine_spec_path, load_recipe, require_directory, resolve_path, to_dict
from ubgen.core.errors import UserError


@dataclass(frozen=True)
class Optimiser:
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)


@dataclass(frozen=True)
class Recipe:
    classes: str
    steps: int = 50
    xformers: bool = False
    precision: Literal["fp16", "fp32"] = "fp32"
    updates: int | None = None
    out: Path = Path("runs")
    tags: tuple[str, ...] = ()
    optimiser: Optimiser = field(default_factory=Optimiser)


def load(tmp_path, text):
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    return load_recipe(path, Recipe)


def test_a_full_recipe(tmp_path):
    recipe = load(
        tmp_path,
        'classes = "imagenet1k"\nsteps = 25\nprecision = "fp16"\nupdates = 7\nout = "here"\ntags = ["a", "b"]\n'
        "[optimiser]\nlr = 1\nbetas = [0.0, 0.99]\n",
    )
    assert recipe == Recipe(
        "imagenet1k", 25, False, "fp16", 7, Path("here"), ("a", "b"), Optimiser(1.0, (0.0, 0.99))
    )
    assert isinstance(recipe.optimiser.lr, float)


def test_defaults_fill_what_is_not_said(tmp_path):
    assert load(tmp_path, 'classes = "x"') == Recipe("x")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('classes = "x"\nstep = 3', "unknown key 'step'; did you mean 'steps'?"),
        ('classes = "x"\n[optimiser]\nlrr = 3', "unknown key 'optimiser.lrr'; did you mean 'lr'?"),
        ('classes = "x"\nzzzz = 3', "unknown key 'zzzz'; valid keys: classes, "),
        ("steps = 3", "missing key 'classes'"),
        ('classes = "x"\nsteps = "many"', "steps must be of type int, not 'many'"),
        ('classes = "x"\nsteps = true', "steps must be of type int, not True"),
        ('classes = "x"\nxformers = 1', "xformers must be of type bool, not 1"),
        ('classes = "x"\nprecision = "fp8"', "precision must be one of ['fp16', 'fp32'], not 'fp8'"),
        ('classes = "x"\nupdates = "all"', "updates must be of type int"),
        ('classes = "x"\noptimiser = 3', "optimiser must be a table"),
        ('classes = "x"\n[optimiser]\nbetas = [0.9]', "optimiser.betas must be a list of 2"),
        ('classes = "x"\ntags = ["a", 1]', "tags[1] must be of type str"),
        ('classes = "x', "is not valid TOML"),
    ],
)
def test_a_wrong_recipe_is_refused_with_the_key(tmp_path, text, message):
    with pytest.raises(UserError) as caught:
        load(tmp_path, text)
    assert message in str(caught.value)
    assert str(tmp_path / "recipe.toml") in str(caught.value)


def test_an_unknown_recipe_name():
    with pytest.raises(UserError, match=r"recipe 'no-such-run' is neither a \.toml file nor one of"):
        load_recipe("no-such-run", Recipe)


def test_an_unknown_engine_spec_name():
    with pytest.raises(UserError, match=r"engine spec 'no-such-spec' is neither a \.toml file nor one of"):
        engine_spec_path("no-such-spec")


def test_an_engine_spec_by_path(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("")
    assert engine_spec_path(path) == path


def test_to_dict_is_plain_data():
    assert to_dict(Recipe("x", tags=("a",))) == {
        "classes": "x",
        "steps": 50,
        "xformers": False,
        "precision": "fp32",
        "updates": None,
        "out": "runs",
        "tags": ["a"],
        "optimiser": {"lr": 1e-4, "betas": [0.9, 0.999]},
    }


def test_paths_into_the_package_and_elsewhere():
    assert (resolve_path("ubgen:data/classes/imagenet100.txt")).is_file()
    assert resolve_path("~/x") == Path.home() / "x"
    assert resolve_path("a/b") == Path("a/b")


def test_require_directory_names_what_is_missing(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert require_directory(tmp_path, "CLIP weights", "config.json") == tmp_path
    with pytest.raises(UserError, match=f"CLIP weights: {tmp_path} has no model.safetensors"):
        require_directory(tmp_path, "CLIP weights", "config.json", "model.safetensors")
    with pytest.raises(UserError, match=f"CLIP weights: {tmp_path}/nowhere is not a directory"):
        require_directory(tmp_path / "nowhere", "CLIP weights")
