"""Train the whole miniature family from scratch and write it with its model card.

    python -m ubgen.miniature.build --out ubgen/miniature/weights

Continues where it was stopped: finished networks are kept in the work directory, unfinished ones go on from their
last checkpoint. Delete the work directory to start over.
"""

import json
import multiprocessing
import shutil
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
import tyro
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

from ubgen.core.config import to_dict
from ubgen.core.errors import UserError, run
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
    processes: int = 2
    """Networks trained at a time, with one CPU thread each."""
    budget: Budget = field(default_factory=Budget)
    """Steps and images per network."""


def check(config: BuildConfig) -> None:
    """UserError for what would fail only after an hour of training, or for a directory of somebody else as `out`."""
    counts = {"processes": config.processes, **{f"budget.{k}": v for k, v in to_dict(config.budget).items()}}
    for name, value in counts.items():
        if value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
    out, work = config.out.resolve(), config.work.resolve()
    if out.is_relative_to(work) or work.is_relative_to(out):
        raise UserError(
            f"--out: {config.out} and --work ({config.work}) overlap; choose separate directories"
        )
    if out.is_dir() and any(out.iterdir()) and not (out / "oracle" / "model.safetensors").is_file():
        raise UserError(f"--out: {config.out} holds something else than a miniature family; choose another")
    config.out.mkdir(parents=True, exist_ok=True)


def build(config: BuildConfig) -> None:
    check(config)
    config.work.mkdir(parents=True, exist_ok=True)
    spawn = multiprocessing.get_context("spawn")
    # a process for each network: two of one thread finish sooner than one of two threads
    with ProcessPoolExecutor(config.processes, spawn, max_tasks_per_child=1) as pool:
        first = [pool.submit(train, name, config) for name in ("vae", "clip", "qalign")]
        first[0].result()  # the others are trained on its latents or its pictures
        second = [pool.submit(train, name, config) for name in ("denoiser", "oracle")]
        for network in (*first, *second):
            network.result()
    whole = (
        config.work / "assembled"
    )  # moved when it is: no kill leaves half a family, which `check` would not know
    assemble(config.work, whole)
    shutil.rmtree(config.out)
    shutil.move(whole, config.out)
    card.write(config.out, seconds={name: _seconds(config.work, name) for name in NETWORKS})


def train(name: str, config: BuildConfig) -> None:
    """Train a network unless its finished directory is there."""
    torch.set_num_threads(1)
    directory, unfinished = config.work / name, config.work / f"{name}.partial"
    if directory.is_dir():
        return
    started, finished = _stamps(config.work, name)
    if not started.exists():
        started.touch()
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    NETWORKS[name](config.work, unfinished, config.budget, config.seed)
    finished.touch()
    unfinished.rename(directory)


def _stamps(work: Path, name: str) -> tuple[Path, Path]:
    """Files whose times are those of the network's first start and of its end."""
    return work / f"{name}.started", work / f"{name}.finished"


def _seconds(work: Path, name: str) -> int:
    """Clock time from the network's first start to its end, pauses included."""
    started, finished = _stamps(work, name)
    return round(finished.stat().st_mtime - started.stat().st_mtime)


def _vae(work: Path, directory: Path, budget: Budget, seed: int) -> None:
    train_vae(work, budget, seed + 10).save_pretrained(directory)


def _denoiser(work: Path, directory: Path, budget: Budget, seed: int) -> None:
    tokenizer = networks.tokenizer(directory / "tokenizer")
    vae = AutoencoderKL.from_pretrained(work / "vae")
    model = train_denoiser(work, vae, tokenizer, budget, seed + 7)
    model.unet.save_pretrained(directory / "unet")
    model.text_encoder.save_pretrained(directory / "text_encoder")


def _oracle(work: Path, directory: Path, budget: Budget, seed: int) -> None:
    oracle = train_oracle(work, AutoencoderKL.from_pretrained(work / "vae"), budget, seed + 20)
    save_file(oracle.state_dict(), directory / "model.safetensors")


def _clip(work: Path, directory: Path, budget: Budget, seed: int) -> None:
    train_clip(work, directory, budget, seed + 30)


def _qalign(work: Path, directory: Path, budget: Budget, seed: int) -> None:
    train_qalign(work, directory, budget, seed + 40)


NETWORKS = {"vae": _vae, "denoiser": _denoiser, "oracle": _oracle, "clip": _clip, "qalign": _qalign}


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
    for config in (sd / "vae/config.json", sd / "unet/config.json"):  # without the path of the work directory
        content = json.loads(config.read_text())
        content.pop("_name_or_path", None)
        config.write_text(json.dumps(content, indent=2) + "\n")
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
    run(lambda: build(tyro.cli(BuildConfig, prog="python -m ubgen.miniature.build")))
