"""Labels of the transfer tasks, found again in the pictures by other means than they were drawn."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy import ndimage

from ubgen.core.config import resolve_path
from ubgen.miniature.networks import Oracle
from ubgen.miniature.shapes import CLASSES, NOVEL_CLASSES
from ubgen.miniature.tasks import TASKS, Task
from ubgen.miniature.world import COLOURS, SCENES, TEXTURES, coverage

BY_NAME = {task.name: task for task in TASKS}


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    """Trained on pictures of the fair world, of all twenty classes."""
    found = Oracle().eval()
    weights = load_file(resolve_path("ubgen:miniature/weights") / "oracle/model.safetensors")
    found.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in weights.items()})
    return found


def drawn(task: Task, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Pictures and labels."""
    labels = np.arange(count) % len(task.classes)
    pictures = [task.draw(int(label), np.random.default_rng((9, i))) for i, label in enumerate(labels)]
    return np.stack(pictures), labels


def seen(oracle: Oracle, pictures: np.ndarray, head: str) -> np.ndarray:
    with torch.no_grad():
        logits = oracle(torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255)
    return logits[head].argmax(1).numpy()


def test_there_are_six_tasks_on_the_novel_classes() -> None:
    assert [task.name for task in TASKS] == [
        "novel-class", "novel-texture", "novel-colour", "novel-background", "novel-count", "novel-rotation",
    ]  # fmt: skip
    rng = np.random.default_rng(0)
    for task in TASKS:
        for label in range(len(task.classes)):
            assert {CLASSES[f.label] for f in task.factors(label, rng)} <= set(NOVEL_CLASSES)


def test_the_oracle_sees_the_class(oracle: Oracle) -> None:
    task = BY_NAME["novel-class"]
    assert task.classes == NOVEL_CLASSES
    pictures, labels = drawn(task, 200)
    assert (seen(oracle, pictures, "label") == labels + 10).mean() > 0.85


def test_the_oracle_sees_the_texture(oracle: Oracle) -> None:
    task = BY_NAME["novel-texture"]
    assert task.classes == TEXTURES
    pictures, labels = drawn(task, 200)
    assert (seen(oracle, pictures, "texture") == labels).mean() > 0.85


def test_the_oracle_sees_the_background_except_where_a_tint_hides_it(oracle: Oracle) -> None:
    task = BY_NAME["novel-background"]
    assert task.classes == SCENES
    pictures, labels = drawn(task, 200)
    assert (seen(oracle, pictures, "scene") == labels).mean() > 0.5
    clear = Task("", task.classes, task.factors)
    assert (seen(oracle, drawn(clear, 200)[0], "scene") == labels).mean() > 0.95


def test_the_object_has_the_colour_of_its_label() -> None:
    task = BY_NAME["novel-colour"]
    assert task.classes == tuple(COLOURS)
    colours = np.array(list(COLOURS.values()))
    right = []
    for i in range(160):
        label = i % len(colours)
        f = task.factors(label, np.random.default_rng((3, i)))[0]
        if f.kind in ("noise", "jpeg"):  # these change only a little of the colour
            picture = task.draw(label, np.random.default_rng((3, i))) / 255
            inside = picture[coverage(f) > 0.95]
            # of the two tones of a texture the one that is nearer to a colour of the list
            distances = np.linalg.norm(inside[:, None] - colours, axis=2)
            right.append(np.percentile(distances, 25, axis=0).argmin() == label)
    assert len(right) > 50
    assert np.mean(right) > 0.9


def test_as_many_separate_objects_lie_in_the_picture_as_the_label_says() -> None:
    task = BY_NAME["novel-count"]
    areas = []
    for i in range(100):
        label = i % 5
        objects = task.factors(label, np.random.default_rng((4, i)))
        covered = np.maximum.reduce([coverage(f) for f in objects])
        assert ndimage.label(covered > 0, np.ones((3, 3)))[1] == int(task.classes[label])
        assert covered[0].max() == covered[-1].max() == covered[:, 0].max() == covered[:, -1].max() == 0
        areas.append((label, covered.sum()))
    # total area alone does not tell the number: neighbours overlap
    assert max(a for label, a in areas if label == 1) > min(a for label, a in areas if label == 3)


def test_the_label_of_a_rotation_is_a_quarter_turn_clockwise() -> None:
    task = BY_NAME["novel-rotation"]
    rng = np.random.default_rng(0)
    for label, name in enumerate(task.classes):
        for _ in range(30):
            (f,) = task.factors(label, rng)
            assert abs(f.angle - int(name)) <= 20
            centred = {"x": 32.0, "y": 32.0}
            upright = coverage(type(f)(**{**vars(f), **centred, "angle": 0.0}))
            turned = coverage(type(f)(**{**vars(f), **centred, "angle": float(name)}))
            likeness = [np.abs(np.rot90(upright, -turns) - turned).mean() for turns in range(4)]
            assert int(np.argmin(likeness)) == label
            assert sorted(likeness)[0] < 0.4 * sorted(likeness)[1]  # every class shows which way up it is
