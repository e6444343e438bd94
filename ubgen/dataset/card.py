"""What lies beside the shards: the class index, and the dataset card that Hugging Face reads."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ubgen.core.console import markdown_table
from ubgen.core.errors import UserError
from ubgen.core.files import Store, open_store
from ubgen.dataset.text import escape, measure_rows, plain, score_titles

CLASSES = "classes.json"
CARD = "README.md"
REJECTIONS = "rejections.jsonl"
SYNTHETIC = (
    "All images are synthetic: a diffusion model generated them. None shows a real scene, person or object."
)
_SIZES = (
    (10**3, "n<1K"),
    (10**4, "1K<n<10K"),
    (10**5, "10K<n<100K"),
    (10**6, "100K<n<1M"),
    (10**7, "1M<n<10M"),
    (10**8, "10M<n<100M"),
    (10**9, "100M<n<1B"),
)
# licence ids of the Hub that are whole names; its families ("cc", "gpl") say too little to be matched
_LICENCES = (
    " afl-3.0 apache-2.0 bsd-2-clause bsd-3-clause bsl-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 "
    "cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 "
    "cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0 cdla-permissive-2.0 cdla-sharing-1.0 "
    "creativeml-openrail-m etalab-2.0 gpl-3.0 mit odbl odc-by openrail openrail++ pddl unlicense "
)
_LISTED = 20


@dataclass(frozen=True)
class CardFacts:
    """What a dataset says of itself in README.md and croissant.json. Texts may be anything; they are made harmless."""

    title: str
    images: int
    classes: int
    shards: int
    extension: str
    """"jpg" or "png"."""
    per_class: int
    sampler: str
    """For example "PNDM, 50 steps, guidance 2.0"."""
    seed: int
    prompt: str
    """How prompts were made, for example "the class name"."""
    engine_key: str
    lora_hash: str = ""
    """Content hash of the LoRA; empty without one."""
    base_model: str = ""
    licence: str = ""
    """Free text: an id that the Hub knows ("cc-by-4.0"), a name or an address."""
    stats: Mapping[str, Any] = field(default_factory=dict)
    """Of `dataset_stats`."""
    measures: Mapping[str, Any] = field(default_factory=dict)
    """Of `ubgen.dataset.tools.measured.measure`; empty where nothing was measured."""
    notes: Sequence[str] = ()
    """Sentences on what a user of the dataset should know of its prompts."""


def write_classes(
    where: str | Path | Store, ids: Sequence[str], names: Sequence[str], prompts: Sequence[str]
) -> None:
    """classes.json: index, id, name and prompt of every class, in label order."""
    rows = zip(ids, names, prompts, strict=True)
    entries = [{"index": i, "id": c, "name": n, "prompt": p} for i, (c, n, p) in enumerate(rows)]
    open_store(where).write(CLASSES, json.dumps(entries, indent=1) + "\n")


def read_classes(where: str | Path | Store) -> list[dict[str, Any]]:
    """The entries of classes.json; UserError if it is missing or not what `write_classes` writes."""
    store = open_store(where)
    path = store.address(CLASSES)
    try:
        entries = json.loads(store.read(CLASSES))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path} is missing; {store} is not a ubgen dataset") from None
    except (ValueError, RecursionError):
        entries = None
    if not isinstance(entries, list) or not all(_is_class(i, entry) for i, entry in enumerate(entries)):
        form = '[{"index": 0, "id": "n02012849", "name": "crane"}, ...]'
        raise UserError(f"{path} is not a list of classes in the order of their indices: {form}")
    return entries


def _is_class(index: int, entry: Any) -> bool:
    if not isinstance(entry, dict) or type(entry.get("index")) is not int or entry["index"] != index:
        return False
    return isinstance(entry.get("name"), str) and isinstance(entry.get("id"), str)


def write_card(where: str | Path | Store, facts: CardFacts) -> None:
    """README.md, with the metadata block that `huggingface_hub` and `datasets` read. Needs classes.json."""
    store = open_store(where)
    store.write(CARD, card_text(facts, [entry["name"] for entry in read_classes(store)]))


def card_text(facts: CardFacts, class_names: Sequence[str]) -> str:
    provenance = [(escape(name), escape(value)) for name, value in _provenance(facts).items()]
    table = markdown_table(["", ""], provenance, text_columns=2)
    parts = [_metadata(facts), f"# {escape(facts.title)}", _introduction(facts), table]
    if scores := _scores(facts.stats):
        parts += ["## Scores", scores]
    if facts.measures:
        parts += ["## Measures", _measures(facts.measures)]
    if facts.notes:
        parts += ["## Prompts", "\n".join(f"- {escape(note, 400)}" for note in facts.notes)]
    parts += ["## Classes", _class_list(class_names), "## Reading it", _reading(facts)]
    return "\n\n".join(parts) + "\n"


def shard_pattern(facts: CardFacts) -> str:
    return f"shard-{{000000..{max(0, facts.shards - 1):06d}}}.tar"


def loader_workers(shards: int) -> str:
    """How many workers a DataLoader may have, which share whole shards."""
    return (
        f"WebDataset gives whole shards to the workers of a DataLoader: there are {shards}, so use at most "
        f"`num_workers={shards}`, or pass\n`empty_check=False` to `WebDataset`."
    )


def licence_fields(licence: str) -> dict[str, str]:
    """The Hub's license, license_name and license_link for a free text."""
    text = plain(licence)
    slug = re.sub(r"[^a-z0-9.+]+", "-", text.lower()).strip("-")
    if not text:
        return {"license": "unknown"}
    if f" {slug} " in _LICENCES:
        return {"license": slug}
    fields = {"license": "other", "license_name": slug or "other"}
    return {**fields, "license_link": text} if re.fullmatch(r"https?://\S+", text) else fields


def licence_metadata(licence: str) -> str:
    """`licence_fields` as lines of YAML."""
    return "\n".join(f"{name}: {_yaml(value)}" for name, value in licence_fields(licence).items())


def stated_licence(where: str | Path | Store) -> str:
    """The licence in the metadata of a dataset's README.md, a text for `licence_fields`; empty without one."""
    try:
        text = open_store(where).read(CARD).decode("utf-8", "replace")
    except (FileNotFoundError, NotADirectoryError):
        return ""
    if not (block := re.match(r"---\r?\n(.*?\n)---", text, re.DOTALL)):
        return ""
    # a value, or the first of a list
    found = re.findall(r"^(license(?:_name|_link)?):(?:\s*\n\s*-)?[ \t]*(\S.*)$", block[1], re.MULTILINE)
    fields = {name: plain(value.strip().strip("\"'")) for name, value in found}
    values = (fields.get(name, "") for name in ("license_link", "license_name", "license"))
    return next((value for value in values if value not in ("", "other", "unknown")), "")


def _metadata(facts: CardFacts) -> str:
    size = next((label for limit, label in _SIZES if facts.images < limit), "1B<n<10B")
    return f"""---
pretty_name: {_yaml(facts.title)}
language:
- en
{licence_metadata(facts.licence)}
annotations_creators:
- machine-generated
source_datasets:
- original
task_categories:
- image-classification
size_categories:
- {size}
tags:
- synthetic
- webdataset
- ubgen
configs:
- config_name: default
  data_files:
  - split: train
    path: "shard-*.tar"
---"""


def _yaml(text: object) -> str:
    """A JSON string is a YAML string, where no character needs JSON's pairs of escapes."""
    return json.dumps(plain(text), ensure_ascii=False)


def _introduction(facts: CardFacts) -> str:
    return f"{facts.images} images of {facts.classes} classes, generated with ubgen.\n\n**{SYNTHETIC}**"


def _provenance(facts: CardFacts) -> dict[str, object]:
    rejected = facts.stats.get("rejected", {})
    reasons = ", ".join(f"{reason}: {count}" for reason, count in rejected.items())
    return {
        "images per class": facts.per_class,
        "shards": facts.shards,
        "base model": facts.base_model or "not stated",
        "LoRA": facts.lora_hash or "none",
        "engine": facts.engine_key,
        "sampler": facts.sampler,
        "prompt": facts.prompt,
        "seed": facts.seed,
        "licence": facts.licence or "not stated",
        "images kept with a flag": facts.stats.get("flagged", 0),
        "images drawn again": f"{sum(rejected.values())} ({reasons})" if rejected else 0,
    }


def _scores(stats: Mapping[str, Any]) -> str:
    figures = ("mean", "std", "min", "max")
    rows = [
        [escape(score_titles(name)[1]), *(f"{stats[name][figure]:.4f}" for figure in figures)]
        for name in stats.get("scores", ())
        if stats[name]["count"]
    ]
    columns = ["score", "mean", "standard deviation", "smallest", "largest"]
    return markdown_table(columns, rows) if rows else ""


def _measures(measures: Mapping[str, Any]) -> str:
    rows = [(escape(name), escape(text, 400)) for name, text in measure_rows(measures).items()]
    parts = [
        f"From features by {escape(measures['encoder'])}; 95 % intervals in brackets.",
        markdown_table(["", ""], rows, text_columns=2),
    ]
    if found := measures["two_meanings"]:
        lines = [
            f"- {escape(entry['name'], 80)}: near "
            + " and ".join(f"{escape(c['near'], 80)} ({c['share']:.0%})" for c in entry["clusters"])
            for entry in found[:_LISTED]
        ]
        parts += ["Classes whose images may show two meanings of the name:", "\n".join(lines)]
    return "\n\n".join(parts)


def _class_list(names: Sequence[str]) -> str:
    lines = [f"- {i}: {escape(name, 80)}" for i, name in enumerate(names[:_LISTED])]
    if len(names) > _LISTED:
        lines.append(f"- and {len(names) - _LISTED} more in `{CLASSES}`")
    return "\n".join(lines)


def _reading(facts: CardFacts) -> str:
    return f"""`shard-*.tar` are WebDataset shards. A sample is an image (`.{facts.extension}`), `.cls` (the class
index as text) and `.json` (class, prompt, identity and scores). `shard-*.idx` are DALI's index files; `shard-*.json`
hold checksum and scores of each shard, `samples.csv` label and scores of every image, `{CLASSES}` the class index,
`rejections.jsonl` the images that were drawn again, and why.

```python
import webdataset as wds  # in the order of the files

data = wds.WebDataset("{shard_pattern(facts)}", shardshuffle=False)
for image, label in data.decode("pil").to_tuple("{facts.extension}", "cls"):
    ...
```

{loader_workers(facts.shards)}

```python
from datasets import load_dataset  # Hugging Face

for sample in load_dataset("webdataset", data_files="shard-*.tar", split="train", streaming=True):
    image, label = sample["{facts.extension}"], sample["cls"]
```

```python
from torchvision.datasets import ImageFolder  # after: ubgen-dataset convert . ../folder --to folder

for image, label in ImageFolder("../folder"):
    ...
```"""
