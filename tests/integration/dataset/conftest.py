"""One small dataset for each kind of image, with everything that the stage leaves beside the shards."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ubgen.core.stage import Stage
from ubgen.dataset import (
    CardFacts,
    ShardWriter,
    dataset_stats,
    open_dataset,
    write_card,
    write_classes,
    write_croissant,
)

NAMES = ["tench, Tinca tinca", "crane", "crane", "../a/b\n\u202e<b>"]
IDS = ["n01440764", "n02012849", "n03126707", "n09999999"]
IMAGES, PER_SHARD = 24, 8


def write(out: Path, extension: str) -> Path:
    """24 images of 4 classes in 3 shards; sample 20 alone has a flag. A class's images have its brightness."""
    with Stage(out, "synth", {"--per-class": 6}).hold() as stage:
        stage.begin()
        write_classes(out, IDS, NAMES, NAMES)
        for shard in range(IMAGES // PER_SHARD):
            with ShardWriter(out, shard, extension) as writer:
                for position in range(shard * PER_SHARD, (shard + 1) * PER_SHARD):
                    label = position % 4
                    pixels = np.full((16, 16, 3), 60 * label + position, np.uint8)
                    meta = {"class_id": IDS[label], "class_name": NAMES[label], "prompt": NAMES[label]}
                    scores = {"clip_similarity": position / 100, "quality": 1 + position / 8}
                    flag = "quality" if position == 20 else None
                    writer.write(position, Image.fromarray(pixels), label, meta, scores, flag)
        stats = dataset_stats(open_dataset(out, partial=True))
        facts = CardFacts(
            title="miniature",
            images=IMAGES,
            classes=4,
            shards=3,
            extension=extension,
            per_class=6,
            sampler="PNDM",
            seed=0,
            prompt="the class name",
            engine_key="key",
            base_model="mini",
            licence="mit",
            stats=stats,
        )
        write_card(out, facts)
        write_croissant(out, facts)
        stage.finish({}, dataset={"shards": 3, "images": IMAGES, "classes": 4})
    return out


@pytest.fixture(scope="session")
def datasets_by_extension(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(extension: str) -> Path:
        if extension not in made:
            made[extension] = write(tmp_path_factory.mktemp(extension) / "dataset", extension)
        return made[extension]

    return get


@pytest.fixture(params=["jpg", "png"])
def extension(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def dataset(datasets_by_extension: Callable[[str], Path], extension: str) -> Path:
    """Not to be changed: all tests share it."""
    return datasets_by_extension(extension)


@pytest.fixture
def jpegs(datasets_by_extension: Callable[[str], Path]) -> Path:
    return datasets_by_extension("jpg")
