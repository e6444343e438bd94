"""Train the whole miniature family from scratch and write it with its model card.

    python -m ubgen.miniature.build --out ubgen/miniature/weights

Continues where it was stopped: finished networks are kept in the work directory, unfinished ones go on from their
last checkpoint. Delete the work directory to start over.
"""

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import tyro
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

from ubgen.miniature import card, networks
from ubgen.miniature.train_generator import Budget, train_denoiser, train_vae
from ubgen.miniature.train_scorers import train_clip, train_oracle, train_qalign


@dataclass(frozen=True)
class BuildConfig:
    """Retrain the miniature family."""

    out: Path = Path(__file__).parent / "weights"
    """Directory for the finished weights and the model card."""
    work: Path = Path("runs/miniature-build")
    """Directory for checkpoints; a later run continues from it."""
    seed: int = 0
    """Seed of data and training."""
    threads: int = 2
    """CPU threads."""
    budget: Budget = field(default_factory=Budget)
    """Steps and images per network."""


def build(config: BuildConfig) -> None:
    torch.set_num_threads(config.threads)
    work, seed, budget = config.work, config.seed, config.budget
    work.mkdir(parents=True, exist_ok=True)
    _once(work, "vae", lambda d: train_vae(work, budget, seed + 10).save_pretrained(d))
    _once(work, "denoiser", lambda d: _denoiser(work, d, budget, seed + 7))
    _once(work, "oracle", lambda d: _oracle(work, d, budget, seed + 20))
    _once(work, "clip", lambda d: train_clip(work, d, budget, seed + 30))
    _once(work, "qalign", lambda d: train_qalign(work, d, budget, seed + 40))
    assemble(work, config.out)
    card.write(config.out, seconds=json.loads((work / "seconds.json").read_text()))


def _once(work: Path, name: str, train: Callable[[Path], object]) -> None:
    """Train a network unless its finished directory is there; note the seconds it took."""
    if (work / name).is_dir():
        return
    unfinished = work / f"{name}.partial"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    start = time.monotonic()
    train(unfinished)
    record = work / "seconds.json"
    seconds = json.loads(record.read_text()) if record.exists() else {}
    record.write_text(json.dumps({**seconds, name: round(time.monotonic() - start)}))
    unfinished.rename(work / name)


def _denoiser(work: Path, directory: Path, budget: Budget, seed: int) -> None:
    tokenizer = networks.tokenizer(directory / "tokenizer")
    model = train_denoiser(work, AutoencoderKL.from_pretrained(work / "vae"), tokenizer, budget, seed)
    model.unet.save_pretrained(directory / "unet")
    model.text_encoder.save_pretrained(directory / "text_encoder")


def _oracle(work: Path, directory: Path, budget: Budget, seed: int) -> None:
    oracle = train_oracle(work, AutoencoderKL.from_pretrained(work / "vae"), budget, seed)
    save_file(oracle.state_dict(), directory / "model.safetensors")


def assemble(work: Path, out: Path) -> None:
    """Write every network in its field's own layout, weights in float16."""
    sd = out / "stable-diffusion"
    shutil.rmtree(out, ignore_errors=True)
    AutoencoderKL.from_pretrained(work / "vae", torch_dtype=torch.float16).save_pretrained(sd / "vae")
    unet = UNet2DConditionModel.from_pretrained(work / "denoiser/unet", torch_dtype=torch.float16)
    unet.save_pretrained(sd / "unet")
    CLIPTextModel.from_pretrained(work / "denoiser/text_encoder").half().save_pretrained(sd / "text_encoder")
    shutil.copytree(work / "denoiser/tokenizer", sd / "tokenizer")
    networks.scheduler().save_pretrained(sd / "scheduler")
    (sd / "model_index.json").write_text(json.dumps(MODEL_INDEX, indent=2) + "\n")
    for name in ("oracle", "clip", "qalign"):
        shutil.copytree(work / name, out / name)
        for file in (out / name).glob("*.safetensors"):
            save_file({k: v.half() if v.is_floating_point() else v for k, v in load_file(file).items()}, file)


MODEL_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "feature_extractor": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "PNDMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


if __name__ == "__main__":
    build(tyro.cli(BuildConfig, prog="python -m ubgen.miniature.build"))
