"""A small image folder that a network can learn: two classes, told apart by their colour."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ubgen.pretrain import Augmentation, PretrainConfig


def write_images(root: Path, count: int, seed: int) -> Path:
    rng = np.random.default_rng(seed)
    for label, colour in (("blue", (40, 60, 200)), ("red", (200, 60, 40))):
        (root / label).mkdir(parents=True)
        for i in range(count):
            noise = rng.normal(0, 25, (40, 40, 3)) + colour
            Image.fromarray(noise.clip(0, 255).astype(np.uint8)).save(root / label / f"{i}.jpg")
    return root


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images") / "train", 13, 0)


@pytest.fixture(scope="session")
def validation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images") / "val", 5, 1)


@pytest.fixture
def config() -> PretrainConfig:
    """3 epochs of 3 updates of 2 accumulated passes of 4 images."""
    return PretrainConfig(
        model="test_resnet",
        image_size=32,
        epochs=3,
        warmup_epochs=1,
        batch_size=8,
        micro_batch=4,
        precision="no",
        evaluate_every=1,
        checkpoint_every=2,
        augmentation=Augmentation(),
        threads=1,
        device="cpu",
    )
