"""Class names and ids are free text; what is shown, or becomes the name of a file, is made harmless here."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

_SAFE = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,98}[A-Za-z0-9_-])?")
_SPLIT = r"train|training|validation|valid|dev|val|test|testing|eval|evaluation"  # words of Hugging Face `datasets`
_RESERVED = re.compile(
    rf"class-.*|.*\.(?:csv|jsonl?|md|parquet|txt)|(?:.*[-._0-9])?(?:{_SPLIT})(?:[-._0-9].*)?"
)
_SCORES = {
    "clip_similarity": ("CLIP similarity", 'CLIP similarity to "photo of {class}", -1 to 1'),
    "quality": ("Q-Align score", "Q-Align score, 1 (bad) to 5 (excellent)"),
}
SCORES = tuple(_SCORES)
"""The scores that ubgen-synth writes."""


def score_titles(name: str) -> tuple[str, str]:
    """A short title, and a full one with the range, for a score of the sidecars."""
    return _SCORES.get(name, (plain(name, 40), plain(name, 40)))


def plain(text: object, limit: int = 200) -> str:
    """One line of printable characters: no controls, line breaks, direction marks or lone surrogates."""
    line = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
    return line if len(line) <= limit else f"{line[: limit - 1]}…"


def escape(text: object, limit: int = 200) -> str:
    """`text` as one line of Markdown that shows it as it is: neither markup, HTML, link nor table break."""
    line = plain(text, limit).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_{}\[\]()#|~$!]|(?<=:)//)", r"\\\1", line)


def safe_names(ids: Sequence[str]) -> list[str]:
    """A file name for each class: its id where that is safe on every file system, or "class-" and its index.

    Safe are up to 100 ASCII letters, digits, dots, dashes and underscores, not dots at the ends; ids that differ in
    case alone are not, nor ids that readers of folders take for a split ("train", "test-tube") or that are named like a
    file beside the classes ("classes.json"). No two names are the same.
    """
    folded = Counter(name.lower() for name in ids)
    return [
        name
        if _SAFE.fullmatch(name) and folded[name.lower()] == 1 and not _RESERVED.fullmatch(name.lower())
        else f"class-{index:06d}"
        for index, name in enumerate(ids)
    ]


def measure_rows(result: Mapping[str, Any]) -> dict[str, str]:
    """The figures of `measure` over all classes, by name, for a table."""
    diversity, agreement, near = (result[name] for name in ("diversity", "agreement", "near_duplicates"))
    within, over = near["within_classes"], near["over_all"]
    warning = "; rises with more samples" if diversity["vendi_grows_with_samples"] else ""
    own = (
        "; the encoder was the reward, so this is no independent check"
        if result["encoder_is_the_reward"]
        else ""
    )
    return {
        "samples": f"{diversity['samples']:,} of {result['images']:,} images",
        "RKE": interval_text(diversity["rke"], ".2f"),
        "Vendi score": interval_text(diversity["vendi"], ".2f") + warning,
        "variance within classes": interval_text(diversity["within_class_variance"], ".4f"),
        "label agreement": f"{interval_text(agreement['share'], '.1%')} ({agreement['method']}){own}",
        "near-duplicates": f"{within['images']:,} of {within['samples']:,} images within their class, "
        f"{over['images']:,} of {over['samples']:,} over all (cosine {near['cosine']} or more)",
        "classes of two meanings": f"{len(result['two_meanings']):,}",
    }


def interval_text(interval: Any, form: str) -> str:
    """ "3.20 [3.00, 3.41]" """
    value, low, high = (format(number, form) for number in interval)
    return f"{value} [{low}, {high}]"
