import pytest
import torch

from ubgen.train import NetworkPaths, RolloutConfig, TrainConfig
from ubgen.train.batches import Batch, class_at, draw_batch, updates_for

NAMES = ("cat", "crane", "dog", "Crane", "bird")
CONFIG = TrainConfig(
    networks=NetworkPaths("", "", ""), classes="", seed=1, rollout=RolloutConfig(steps=6, grad_steps=2)
)


def batch(update: int, size: int = 4, rank: int = 0, processes: int = 1, phase: str = "train") -> Batch:
    return draw_batch(CONFIG, NAMES, (4, 2, 2), phase, update, size, rank, processes)


@pytest.mark.parametrize(
    ("epochs", "classes", "images", "updates"),
    [(3, 1000, 4, 750), (3, 1000, 32, 94), (1, 1000, 64, 16), (0.1, 10, 1, 1), (0, 10, 4, 0)],
)
def test_length_covers_the_class_list(epochs: float, classes: int, images: int, updates: int) -> None:
    assert updates_for(epochs, classes, images) == updates


def test_each_pass_is_another_permutation_of_the_classes() -> None:
    order = [class_at(position, 50, "train", 0) for position in range(150)]
    passes = [order[i : i + 50] for i in (0, 50, 100)]
    assert all(sorted(p) == list(range(50)) for p in passes)
    assert len({tuple(p) for p in passes}) == 3
    assert passes[0] != [class_at(position, 50, "train", 1) for position in range(50)]


def test_a_batch_is_a_function_of_its_place_alone() -> None:
    first = batch(3)
    torch.manual_seed(5)
    batch(2)
    again = batch(3)
    assert torch.equal(first.latents, again.latents)
    assert torch.equal(first.step_noise, again.step_noise)
    assert torch.equal(first.negatives_B, again.negatives_B)
    assert first.grad_steps == again.grad_steps


def test_processes_share_the_images_of_one() -> None:
    alone = batch(1, size=4)
    shares = [batch(1, size=2, rank=rank, processes=2) for rank in (0, 1)]
    assert torch.equal(alone.classes_B, torch.cat([s.classes_B for s in shares]))
    assert torch.equal(alone.negatives_B, torch.cat([s.negatives_B for s in shares]))
    assert torch.equal(alone.latents, torch.cat([s.latents for s in shares]))
    assert torch.equal(alone.step_noise, torch.cat([s.step_noise for s in shares], dim=1))


def test_processes_draw_their_own_start_step() -> None:
    starts = [tuple(batch(u, 1, rank, 2).grad_steps for rank in (0, 1)) for u in range(20)]
    assert any(a != b for a, b in starts)


def test_warmup_and_training_see_different_noise() -> None:
    assert not torch.equal(batch(0, phase="warmup").latents, batch(0).latents)


def test_shapes_and_steps() -> None:
    drawn = batch(0)
    assert drawn.latents.shape == (4, 4, 2, 2)
    assert drawn.step_noise.shape == (6, 4, 4, 2, 2)
    assert len(drawn.grad_steps) == 2


def test_negatives_never_share_the_name() -> None:
    seen = set()
    for update in range(60):
        drawn = batch(update)
        for own, other in zip(drawn.classes_B.tolist(), drawn.negatives_B.tolist(), strict=True):
            assert NAMES[own].lower() != NAMES[other].lower()
            seen.add((own, other))
    assert len(seen) == 5 * 4 - 2  # all ordered pairs but those of the two cranes
