"""Small datasets of real JPEGs."""

import io
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from ubgen.dataset import ShardWriter


def picture(seed: int, width: int = 96, height: int = 80) -> Image.Image:
    """Blocks of random colours with a little noise."""
    rng = np.random.default_rng(seed)
    blocks = np.kron(rng.integers(0, 256, (height // 8, width // 8, 3)), np.ones((8, 8, 1)))
    return Image.fromarray(np.clip(blocks + rng.normal(0, 4, blocks.shape), 0, 255).astype(np.uint8))


def encoded(image: Image.Image, form: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def write_shards(root: Path, counts: list[int], classes: int = 3, prefix: str = "c") -> Path:
    """A finished dataset with so many samples in each shard; sample i is of class i % classes."""
    root.mkdir(parents=True, exist_ok=True)
    position = 0
    for number, count in enumerate(counts):
        with ShardWriter(root, number) as shard:
            for _ in range(count):
                shard.write(position, encoded(picture(position)), position % classes, {}, {"quality": 3.0})
                position += 1
    entries = [{"index": i, "id": f"{prefix}{i}", "name": f"name {i}"} for i in range(classes)]
    (root / "classes.json").write_text(json.dumps(entries))
    (root / "manifest.json").write_text(json.dumps({"stage": "synth", "dataset": {"shards": len(counts)}}))
    return root


def write_folders(root: Path, names: list[str], count: int = 2) -> Path:
    for label, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for i in range(count):
            (root / name / f"{i}.jpg").write_bytes(encoded(picture(100 * label + i)))
    return root


@pytest.fixture(scope="session")
def make() -> SimpleNamespace:
    """The functions above, for tests."""
    return SimpleNamespace(picture=picture, encoded=encoded, shards=write_shards, folders=write_folders)


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards"), [7, 1, 12])
