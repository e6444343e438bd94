"""What a finished run leaves: weights, the learning curve, and the model card."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from ubgen.core.config import to_dict
from ubgen.core.console import markdown_table
from ubgen.core.files import atomic_write
from ubgen.core.metrics import METRICS_FILE, read_metrics
from ubgen.dataset.card import licence_metadata, stated_licence
from ubgen.dataset.text import escape
from ubgen.loading.imageset import ImageSet
from ubgen.pretrain.config import PretrainConfig

WEIGHTS = {"raw": "model.safetensors", "EMA": "model_ema.safetensors"}
CURVE, CARD, CONFIG = "curve.png", "README.md", "config.json"


def save_weights(path: Path, model: torch.nn.Module) -> None:
    """A file that `timm.create_model(name, ..., checkpoint_path=path)` loads; equal weights give equal bytes."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    atomic_write(path, save(tensors, metadata={"format": "pt"}))


def write_reports(
    out: Path, config: PretrainConfig, options: dict[str, Any], data: ImageSet, recipe: str, skipped: int
) -> None:
    """config.json, the curve and the card."""
    lines = read_metrics(out / METRICS_FILE)
    values = {
        "architecture": config.model,
        "timm": options,
        "class_ids": data.class_ids,
        "recipe": to_dict(config),
    }
    atomic_write(out / CONFIG, json.dumps(values, indent=1) + "\n")
    save_curve(out / CURVE, lines)
    atomic_write(out / CARD, card(config, options, data, recipe, lines, skipped))


def save_curve(path: Path, lines: list[dict[str, Any]]) -> None:
    """A PNG: the training loss, and accuracy on the validation set where there is one, over epochs."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    train = [line for line in lines if line["phase"] == "train"]
    measured = [line for line in lines if line["phase"] == "eval"]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.add_subplot()
    axis.plot([line["epoch"] for line in train], [line["loss"] for line in train], color="tab:grey")
    axis.set(xlabel="epoch", ylabel="training loss (mixed targets)")
    if measured:
        right = axis.twinx()
        for name, label in (("top1", "raw"), ("ema_top1", "EMA")):
            right.plot([m["epoch"] for m in measured], [m[name] for m in measured], marker="o", label=label)
        right.set(ylabel="validation top-1 (%)", ylim=(0, 100))
        figure.legend(loc="outside upper right", ncols=2)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    atomic_write(path, buffer.getvalue())


def card(
    config: PretrainConfig,
    options: dict[str, Any],
    data: ImageSet,
    recipe: str,
    lines: list[dict[str, Any]],
    skipped: int,
) -> str:
    """The model card, in Markdown."""
    arguments = "".join(f", {name}={value!r}" for name, value in options.items())
    loads = "\n".join(
        f'model = timm.create_model("{config.model}"{arguments}, checkpoint_path="{file}")  # {kind}'
        for kind, file in WEIGHTS.items()
    )
    steps = "".join(f"| {name} | {escape(value)} |\n" for name, value in _flat(to_dict(config)))
    licence = stated_licence(data.store)
    terms = (
        f"The card of the dataset names this licence: {escape(licence)}."
        if licence
        else "Unknown: the dataset has no card that names one."
    )
    left_out = f" {skipped} images could not be decoded and were left out." if skipped else ""
    return f"""---
library_name: timm
tags: [image-classification, pre-training]
{licence_metadata(licence)}
---

# {config.model}, pre-trained

Trained by `ubgen-pretrain` with the recipe `{escape(recipe)}` on {len(data):,} images of
{len(data.class_ids):,} classes ({escape(data.store)}, {data.fingerprint()}).{left_out}

```python
import timm
{loads}
```

Inputs are RGB, {config.image_size}x{config.image_size}, normalised with ImageNet's mean and standard deviation.

## Accuracy

{_figures(lines)}

## Recipe

| option | value |
| --- | --- |
{steps}
## Licence

{terms} The terms of the dataset, and of the generator that made it, may
restrict how the weights are used.
"""


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every option that is set, those of tables by their full names."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        elif value is not None:
            yield prefix + name, value


def _figures(lines: list[dict[str, Any]]) -> str:
    last = next((line for line in reversed(lines) if line["phase"] == "eval"), None)
    if last is None:
        return "Not measured: the run had no validation set."
    rows = [
        (kind, *(f"{last[f'{prefix}{name}']:.2f}" for name in ("top1", "top5")))
        for kind, prefix in (("raw", ""), ("EMA", "ema_"))
    ]
    return markdown_table(["weights", "top-1 (%)", "top-5 (%)"], rows)
