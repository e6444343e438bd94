import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ubgen.core.classes import load_classes
from ubgen.miniature import quality
from ubgen.miniature.backgrounds import BACKGROUNDS
from ubgen.miniature.shapes import CLASSES, NOVEL_CLASSES, TRAIN_CLASSES
from ubgen.miniature.world import SCENES, Factors, biased_scene, biased_world, fair_world, render, render_many


def scenes_and_labels(factors: list[Factors]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([f.scene for f in factors]), np.array([f.label for f in factors])


def test_a_picture_depends_on_seed_and_index_alone() -> None:
    many, factors = render_many(biased_world(), 12, seed=3)
    few, same = render_many(biased_world(), 5, seed=3)
    assert np.array_equal(many[:5], few)
    assert factors[:5] == same
    other, _ = render_many(biased_world(), 5, seed=4)
    assert not np.array_equal(few, other)


def test_the_renderer_draws_what_the_shipped_networks_were_trained_on() -> None:
    golden = np.asarray(Image.open(Path(__file__).parents[2] / "golden/miniature/world.png")).astype(int)
    worlds = (fair_world(severity_range=(0.0, 1.0)), biased_world())
    now = np.vstack([np.hstack(list(render_many(world, 8, seed=5)[0])) for world in worlds])
    # sines of another processor may differ in the last bit, and so may a rounding
    assert np.abs(now - golden).max() <= 1
    assert (now != golden).mean() < 1e-3


def test_a_large_background_shows_more_at_the_same_grain() -> None:
    for name, draw in BACKGROUNDS.items():
        small, large = draw(np.random.default_rng(0)), draw(np.random.default_rng(0), 128)
        assert large.shape == (128, 128, 3)
        assert large.min() >= 0
        assert large.max() <= 1
        grain = [np.abs(np.diff(picture, axis=axis)).mean() for picture in (small, large) for axis in (0, 1)]
        assert grain[2:] == pytest.approx(grain[:2], abs=0.012), name


def test_the_biased_world_ties_background_to_class_at_the_stated_strength() -> None:
    rng = np.random.default_rng(0)
    world = biased_world(scene_strength=0.8)
    scenes, labels = scenes_and_labels([world.draw(rng) for _ in range(4000)])
    share = (scenes == np.array([biased_scene(k) for k in labels])).mean()
    assert share == pytest.approx(0.8 + 0.2 / len(SCENES), abs=0.03)
    assert set(labels) == set(range(len(TRAIN_CLASSES)))


def test_the_fair_world_draws_factors_independently_over_all_classes() -> None:
    rng = np.random.default_rng(0)
    scenes, labels = scenes_and_labels([fair_world().draw(rng) for _ in range(4000)])
    share = (scenes == np.array([biased_scene(k) for k in labels])).mean()
    assert share == pytest.approx(1 / len(SCENES), abs=0.03)
    assert set(labels) == set(range(len(CLASSES)))


@pytest.mark.parametrize("label", range(len(CLASSES)))
def test_every_class_is_visible_on_every_background(label: int) -> None:
    for scene in range(len(SCENES)):
        shown = Factors(label, scene, 0, 0, 32.0, 32.0, 20.0, 0.0, "blur", 0.0)
        with_object = render(shown, np.random.default_rng(1)).astype(int)
        hidden = Factors(label, scene, 0, 0, 500.0, 500.0, 20.0, 0.0, "blur", 0.0)  # off the canvas
        changed = np.abs(with_object - render(hidden, np.random.default_rng(1))).sum(axis=2) > 40
        assert 0.05 < changed.mean() < 0.5


@pytest.mark.parametrize("kind", quality.KINDS)
def test_more_severity_moves_a_picture_further_away(kind: str) -> None:
    clean = render_many(fair_world(), 1, seed=0)[0][0]
    distances = []
    for severity in (0.0, 0.3, 0.6, 1.0):
        worse = quality.degrade(clean, kind, severity, np.random.default_rng(0))
        assert worse.dtype == np.uint8
        assert worse.shape == clean.shape
        distances.append(np.abs(worse.astype(int) - clean).mean())
    assert distances[0] == 0
    assert distances == sorted(distances)
    assert distances[-1] > 2


def test_the_class_lists_of_the_package_are_those_of_the_world() -> None:
    assert load_classes("miniature").names == TRAIN_CLASSES
    assert load_classes("miniature-novel").names == NOVEL_CLASSES


def test_ten_thousand_pictures_take_less_than_a_minute() -> None:
    start = time.process_time()
    render_many(fair_world(severity_range=(0.0, 1.0)), 500, seed=0)
    assert (time.process_time() - start) * 20 < 60
