"""Index files of NVIDIA DALI's `fn.readers.webdataset`, which lets it start anywhere in a shard.

One line for each sample: extension, offset, size and name of each member; the same as DALI's `wds2idx` writes.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_VERSION = "v1.2"


def index_line(key: str, members: Mapping[str, Sequence[int]]) -> str:
    """The line of one sample. `members` is [offset, size] by extension, in the tar's order."""
    return " ".join(f"{ext} {offset} {size} {key}.{ext}" for ext, (offset, size) in members.items())


def index_text(lines: Sequence[str]) -> str:
    """The index file of a shard."""
    return "\n".join((f"{_VERSION} {len(lines)}", *lines, ""))


def index_of(samples: Iterable[Mapping[str, Any]], extension: str) -> str:
    """The index file of a shard, made again from its sidecar's `samples`."""
    return index_text(
        [index_line(s["key"], {extension: s["image"], "cls": s["cls"], "json": s["json"]}) for s in samples]
    )
