"""What lies beside the shards: the class index and the dataset card."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ubgen.errors import UserError
from ubgen.manifest import atomic_write

CLASSES = "classes.json"
CARD = "README.md"
_SIZES = (
    (10**3, "n<1K"),
    (10**4, "1K<n<10K"),
    (10**5, "10K<n<100K"),
    (10**6, "100K<n<1M"),
    (10**7, "1M<n<10M"),
)


def write_classes(directory: Path, ids: Sequence[str], names: Sequence[str], prompts: Sequence[str]) -> None:
    """classes.json: index, id, name and prompt of every class, in label order."""
    rows = zip(ids, names, prompts, strict=True)
    entries = [{"index": i, "id": c, "name": n, "prompt": p} for i, (c, n, p) in enumerate(rows)]
    atomic_write(directory / CLASSES, json.dumps(entries, indent=1) + "\n")


def read_classes(directory: Path) -> list[dict[str, Any]]:
    path = directory / CLASSES
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        names = [entry["name"] for entry in entries]
    except FileNotFoundError:
        raise UserError(f"{path} is missing; {directory} is not a ubgen dataset") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is not a list of classes; run ubgen-synth again") from None
    return entries if names else []


def write_card(directory: Path, title: str, facts: dict[str, str], images: int, classes: int) -> None:
    """README.md with the metadata block that Hugging Face reads. `facts` become a table of settings and figures."""
    size = next((label for limit, label in _SIZES if images < limit), "n>10M")
    table = "\n".join(f"| {name} | {_cell(value)} |" for name, value in facts.items())
    atomic_write(
        directory / CARD,
        f"""---
pretty_name: {json.dumps(title)}
task_categories:
- image-classification
size_categories:
- {size}
tags:
- synthetic
- webdataset
- ubgen
---

# {_cell(title)}

{images} synthetic images of {classes} classes, generated with ubgen. No image shows a real scene.

| | |
| --- | --- |
{table}

`shard-*.tar` are WebDataset shards: each sample is an image, `.cls` (the class index) and `.json` (class, prompt,
identity and scores). `shard-*.json` hold the checksum and the scores of each shard, `classes.json` the class index.

```python
import webdataset as wds
samples = wds.WebDataset("shard-{{000000..{max(0, int(facts.get("shards", "1")) - 1):06d}}}.tar", shardshuffle=False)
for image, label in samples.decode("pil").to_tuple("jpg;png", "cls"):
    ...
```
""",
    )


def _cell(text: str) -> str:
    """One line, no table breaks: class lists may have any name."""
    return " ".join(str(text).split()).replace("|", "\\|")
