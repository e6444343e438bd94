"""The dataset format: WebDataset tar shards with a sidecar each, written once, read by index or in order."""

from ubgen.dataset.card import write_card, write_classes
from ubgen.dataset.reader import LabelledImages, Sample, ShardDataset, open_dataset
from ubgen.dataset.shards import ShardInfo, ShardWriter, encode_image, finished_shard, shard_files, shard_name

__all__ = [
    "LabelledImages",
    "Sample",
    "ShardDataset",
    "ShardInfo",
    "ShardWriter",
    "encode_image",
    "finished_shard",
    "open_dataset",
    "shard_files",
    "shard_name",
    "write_card",
    "write_classes",
]
