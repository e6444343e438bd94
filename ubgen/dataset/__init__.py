"""The dataset format: WebDataset tar shards with a sidecar each, written once, read by index or in order."""

from ubgen.core.files import Store, open_store
from ubgen.dataset.card import CardFacts, write_card, write_classes
from ubgen.dataset.croissant import write_croissant
from ubgen.dataset.images import encode_image, is_marked_synthetic, mark_synthetic
from ubgen.dataset.reader import LabelledImages, Sample, ShardDataset, open_dataset
from ubgen.dataset.shards import (
    SampleRecord,
    ShardInfo,
    ShardWriter,
    finished_shard,
    finished_shards,
    index_of,
    shard_files,
    shard_name,
)
from ubgen.dataset.tools.pictures import write_pictures
from ubgen.dataset.tools.stats import dataset_stats

__all__ = [
    "CardFacts",
    "LabelledImages",
    "Sample",
    "SampleRecord",
    "ShardDataset",
    "ShardInfo",
    "ShardWriter",
    "Store",
    "dataset_stats",
    "encode_image",
    "finished_shard",
    "finished_shards",
    "index_of",
    "is_marked_synthetic",
    "mark_synthetic",
    "open_dataset",
    "open_store",
    "shard_files",
    "shard_name",
    "write_card",
    "write_classes",
    "write_croissant",
    "write_pictures",
]
