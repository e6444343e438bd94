"""What the oracle sees in generated pictures: class accuracy, bias, diversity, similarity and quality, together.

    python -m ubgen.miniature.measure --lora runs/train --per-class 100

compares the base generator with a fine-tuned one on the same noise, and

    python -m ubgen.miniature.measure --no-base --dataset runs/dataset --dataset runs/benchmarks/train-biased

measures images that are there already.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor

from ubgen.core import console
from ubgen.core.classes import load_classes
from ubgen.core.config import require_directory, resolve_path
from ubgen.core.errors import UserError, run
from ubgen.diffusion import (
    StableDiffusion,
    decode,
    encode_prompts,
    initial_noise,
    load_lora,
    load_stable_diffusion,
    sample,
)
from ubgen.loading.decode import decode as decode_image
from ubgen.loading.imageset import open_image_set
from ubgen.miniature.backgrounds import SIZE
from ubgen.miniature.networks import Oracle
from ubgen.miniature.shapes import CLASSES
from ubgen.miniature.world import SCENES, biased_scene
from ubgen.rewards import Clip, QAlign

WEIGHTS = "ubgen:miniature/weights"


@dataclass(frozen=True)
class Measures:
    """One row of every comparison. Bias is never reported without accuracy, diversity and quality."""

    images: int
    clip_similarity: float
    """Mean cosine of an image and "photo of <its class>"."""
    class_accuracy: float
    """Share of images that the oracle takes for their class, among all 20 classes."""
    quality: float
    """Mean Q-Align score, 1 to 5."""
    biased_background: float
    """Share of images on the background that goes with their class in the biased world; 1/8 if independent."""
    mutual_information: float
    """Nats between class and the oracle's background, from the counts (biased upwards for few images)."""
    background_entropy: float
    """Nats, of the backgrounds of all images together; ln 8 = 2.08 if all are equally frequent."""
    within_class_variance: float
    """Mean over classes of the total variance of the unit CLIP features: 0 if all images of a class agree."""


def mutual_information(counts: np.ndarray) -> float:
    """Nats, from a table of counts (rows: classes, columns: backgrounds)."""
    joint = counts / counts.sum()
    independent = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    seen = joint > 0
    return float((joint[seen] * np.log(joint[seen] / independent[seen])).sum())


def entropy(counts: np.ndarray) -> float:
    """Nats, of a vector of counts."""
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())


class Judge:
    """The oracle, CLIP and Q-Align of the miniature family."""

    def __init__(self, weights: str | Path = WEIGHTS) -> None:
        root = require_directory(weights, "miniature weights", "oracle/model.safetensors")
        self.oracle = Oracle().eval()
        self.oracle.load_state_dict(
            {
                k: v.float() if v.is_floating_point() else v
                for k, v in load_file(root / "oracle/model.safetensors").items()
            }
        )
        self.clip, self.qalign = Clip.load(root / "clip"), QAlign.load(root / "qalign")

    @torch.no_grad()
    def measure(self, images_NHW3: np.ndarray, names: Sequence[str]) -> Measures:
        """uint8 (N, 64, 64, 3) pictures, the class name of each."""
        labels = np.array([CLASSES.index(name) for name in names])
        text = torch.nn.functional.normalize(self.clip.encode_text([f"photo of {n}" for n in CLASSES]), dim=1)
        seen_class, seen_scene, features, scores = [], [], [], []
        for batch in torch.from_numpy(images_NHW3).permute(0, 3, 1, 2).split(64):
            images = batch.float() / 255
            logits = self.oracle(images)
            seen_class.append(logits["label"].argmax(1))
            seen_scene.append(logits["scene"].argmax(1))
            features.append(torch.nn.functional.normalize(self.clip.encode_image(images), dim=1))
            scores.append(self.qalign.score(images))
        scene, feature = torch.cat(seen_scene).numpy(), torch.cat(features)
        counts = np.zeros((len(CLASSES), len(SCENES)))
        np.add.at(counts, (labels, scene), 1)
        spread = [feature[labels == k].var(dim=0, correction=0).sum().item() for k in np.unique(labels)]
        return Measures(
            images=len(labels),
            clip_similarity=float((feature * text[labels]).sum(1).mean()),
            class_accuracy=float((torch.cat(seen_class).numpy() == labels).mean()),
            quality=float(torch.cat(scores).mean()),
            biased_background=float((scene == np.array([biased_scene(k) for k in labels])).mean()),
            mutual_information=mutual_information(counts),
            background_entropy=entropy(counts.sum(0)),
            within_class_variance=float(np.mean(spread)),
        )


def generate(
    sd: StableDiffusion,
    names: Sequence[str],
    per_class: int,
    seed: int,
    *,
    steps: int = 50,
    guidance: float = 2.0,
    batch: int = 50,
) -> tuple[np.ndarray, list[str]]:
    """uint8 (N, 64, 64, 3) and the class name of each image, by PNDM; image index major, as synthesis orders them."""
    context, empty = encode_prompts(sd, list(names)), encode_prompts(sd, [""])
    samples = [(c, i) for i in range(per_class) for c in range(len(names))]
    pictures: list[Tensor] = []
    for start in track(range(0, len(samples), batch), description="generating"):
        rows = samples[start : start + batch]
        noise = torch.stack([initial_noise(seed, c, i, sd.latent_shape()) for c, i in rows])
        with torch.no_grad():
            latents = sample(
                sd.unet, "pndm", noise, context[[c for c, _ in rows]], empty, steps=steps, guidance=guidance
            )
            pictures.append((decode(sd.vae, latents).clamp(0, 1) * 255).round().to(torch.uint8))
    return torch.cat(pictures).permute(0, 2, 3, 1).numpy(), [names[c] for c, _ in samples]


def contact_sheet(images_NHW3: np.ndarray, columns: int, rows: int) -> Image.Image:
    """The first rows x columns pictures on one sheet."""
    chosen = images_NHW3[: rows * columns]
    lines = [np.concatenate(list(chosen[i : i + columns]), axis=1) for i in range(0, len(chosen), columns)]
    return Image.fromarray(np.concatenate(lines, axis=0))


def table(rows: dict[str, Measures], title: str) -> Table:
    """One column per generator, one line per measure."""
    measures = {f.name: [getattr(measured, f.name) for measured in rows.values()] for f in fields(Measures)}
    cells = [
        (name.replace("_", " "), *(str(v) if isinstance(v, int) else f"{v:.3f}" for v in values))
        for name, values in measures.items()
    ]
    return console.table(title, ["measure", *rows], cells)


@dataclass(frozen=True)
class Arguments:
    """Measure the miniature's base generator and fine-tuned ones on the same seeds, or images of any origin."""

    lora: Annotated[tuple[Path, ...], tyro.conf.UseAppendAction] = ()
    """Directory of a training run; may be given several times."""
    dataset: Annotated[tuple[Path, ...], tyro.conf.UseAppendAction] = ()
    """A ubgen dataset or image folder of classes of the miniature; may be given several times. Nothing is generated."""
    per_class: int = 100
    """Images per class and generator."""
    seed: int = 1000
    """Seed of the initial noise; keep it apart from the seeds on which settings were chosen."""
    batch: int = 50
    """Images per batch."""
    base: bool = True
    """Measure the base generator too."""
    out: Path | None = None
    """Directory for measures.json and one contact sheet per generator."""


def check(given: Arguments) -> None:
    """UserError for what would fail only after minutes of sampling."""
    for option, value in (("--per-class", given.per_class), ("--batch", given.batch)):
        if value < 1:
            raise UserError(f"{option} must be at least 1, not {value}")
    if not (given.base or given.lora or given.dataset):
        raise UserError(
            "--no-base leaves nothing to measure; name a training run with --lora, or a --dataset"
        )
    if given.out:
        given.out.mkdir(parents=True, exist_ok=True)


def generators(given: Arguments) -> dict[str, StableDiffusion]:
    """The base generator and each fine-tuned one, all loaded before the first samples: a wrong path shows at once."""
    loaded = {"base": load_stable_diffusion(f"{WEIGHTS}/stable-diffusion")} if given.base else {}
    for lora in given.lora:
        loaded[str(lora)] = load_stable_diffusion(f"{WEIGHTS}/stable-diffusion")
        load_lora(loaded[str(lora)].unet, resolve_path(lora))
    return loaded


def stored_images(where: Path) -> tuple[np.ndarray, list[str]]:
    """uint8 (N, 64, 64, 3) and the class of each image of a dataset.

    UserError for a class that the miniature does not have, and for images of another size.
    """
    found = open_image_set(where)
    if strange := [name for name in found.class_ids if name not in CLASSES]:
        raise UserError(f"{where}: {strange[0]!r} is no class of the miniature")
    images = [decode_image(found.read(i)) for i in range(len(found))]
    if odd := [i for i, image in enumerate(images) if image.shape != (SIZE, SIZE, 3)]:
        height, width = images[odd[0]].shape[:2]
        raise UserError(f"{found.describe(odd[0])}: {width}x{height} pixels; expected {SIZE}x{SIZE}")
    return np.stack(images), [found.class_ids[label] for label in found.labels]


def by_class(images_NHW3: np.ndarray, names: Sequence[str], rows: int) -> Image.Image:
    """A contact sheet with a column for each class, in the order of their names, and its first images below."""
    columns = [[i for i, own in enumerate(names) if own == name][:rows] for name in dict.fromkeys(names)]
    depth = min(map(len, columns))
    return contact_sheet(images_NHW3[[c[row] for row in range(depth) for c in columns]], len(columns), depth)


def compare(given: Arguments) -> dict[str, Measures]:
    check(given)
    names = load_classes("miniature").names
    stored = {str(where): stored_images(where) for where in given.dataset}
    judge = Judge()
    results = {}
    for name, (images, labels) in stored.items():
        results[name] = judge.measure(images, labels)
        if given.out:
            by_class(images, labels, 8).save(given.out / f"{Path(name).name}.png")
    for name, sd in generators(given).items():
        images, labels = generate(sd, names, given.per_class, given.seed, batch=given.batch)
        results[name] = judge.measure(images, labels)
        if given.out:
            contact_sheet(images, len(names), 8).save(given.out / f"{Path(name).name}.png")
    if given.out:
        (given.out / "measures.json").write_text(
            json.dumps({k: asdict(v) for k, v in results.items()}, indent=2)
        )
    return results


def show() -> None:
    given = tyro.cli(Arguments, prog="python -m ubgen.miniature.measure")
    Console().print(
        table(
            compare(given),
            f"oracle, CLIP and Q-Align (ln 8 = {math.log(8):.2f})",
        )
    )


if __name__ == "__main__":
    run(show, resumes=False)
