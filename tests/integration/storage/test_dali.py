"""NVIDIA DALI's reader, on the CPU: every sample with its label, with our index files."""

from pathlib import Path

import numpy as np
import pytest

from ubgen.dataset import ShardWriter

dali = pytest.importorskip("nvidia.dali")


def write(out: Path) -> tuple[list[str], list[str]]:
    for shard in range(2):
        with ShardWriter(out, shard) as writer:
            for position in range(shard * 5, shard * 5 + 5):
                image = np.full((16, 16, 3), 20 * position, np.uint8)
                writer.write(position, image, 100 + position, {"class_name": "../x\n"}, {"quality": 1.0})
    return [[str(out / f"shard-{i:06d}.{ending}") for i in range(2)] for ending in ("tar", "idx")]


def read(paths: list[str], index: list[str], **options: int) -> list[tuple[int, int]]:
    """(label, grey level) of the samples."""

    @dali.pipeline_def(batch_size=5, num_threads=1, device_id=None)
    def pipeline() -> tuple[object, object]:
        data, label = dali.fn.readers.webdataset(
            paths=paths, index_paths=index, ext=["jpg", "cls"], name="reader", **options
        )
        return dali.fn.decoders.image(data, device="cpu"), label

    built = pipeline()
    built.build()
    size = built.reader_meta("reader")["epoch_size"]
    rows = []
    for _ in range(size // 5 // options.get("num_shards", 1)):
        images, labels = built.run()
        rows += [
            (int(bytes(np.asarray(y))), int(np.asarray(x).mean().round()))
            for x, y in zip(images, labels, strict=True)
        ]
    return rows


def test_dali_reads_it_with_our_index(tmp_path: Path) -> None:
    rows = read(*write(tmp_path))
    assert [label for label, _ in rows] == list(range(100, 110))
    assert all(abs(grey - 20 * (label - 100)) <= 1 for label, grey in rows)


def test_dali_starts_in_the_middle(tmp_path: Path) -> None:
    """The index is what lets the second of two readers skip the first one's samples."""
    assert [label for label, _ in read(*write(tmp_path), num_shards=2, shard_id=1)] == list(range(105, 110))
