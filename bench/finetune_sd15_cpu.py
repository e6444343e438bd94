"""One warm-up and one training update of fine-tuning at Stable Diffusion 1.5's real sizes, on the CPU.

    OMP_NUM_THREADS=1 python bench/finetune_sd15_cpu.py --work WORK --markdown bench/results/finetune-sd15-cpu.md

All weights are random: UNet, VAE and text encoder of SD 1.5 as fp16 variants, CLIP ViT-L/14 as a transformers
directory, and a full-width Q-Align of 2 layers. The command stops after the warm-up. The same command again resumes,
does the training update, and lets diffusers load the LoRA. It needs about 8 GB of disk in --work, and the memory that
the page of results names. --work can be removed afterwards.
"""

import argparse
import dataclasses
import json
import os
import shutil
import textwrap
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ubgen.core.config import load_recipe
from ubgen.core.console import markdown_table
from ubgen.core.stage import device_name, library_versions
from ubgen.diffusion import LORA_FILE, load_stable_diffusion
from ubgen.rewards import QAlign
from ubgen.train import NetworkPaths, TrainConfig, loop, train

QALIGN = Path(__file__).with_name("qalign-7b.json")
NAMES = ("crane", "goldfish", "red wine", "steam locomotive")


# --- weights ---


def write_weights(work: Path) -> NetworkPaths:
    """The three directories; those that are there as a whole are kept."""
    makers = {"sd15": write_stable_diffusion, "clip": write_clip, "qalign": write_qalign}
    for name, make in makers.items():
        if not (work / name).exists():
            shutil.rmtree(work / f"{name}.part", ignore_errors=True)
            make(work / f"{name}.part")
            (work / f"{name}.part").rename(work / name)
            print(f"wrote {work / name}", flush=True)
    return NetworkPaths(str(work / "sd15"), str(work / "clip"), str(work / "qalign"))


def random_weights(make: Callable[[], Any], dtype: torch.dtype) -> Any:
    """A network in `dtype`: normal weights of variance 1 / fan-in, biases 0, norms 1."""
    with torch.device("meta"):
        network: nn.Module = make().to(dtype)
    network.to_empty(device="cpu")
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if tensor.ndim > 1:
                tensor.normal_(std=0.02 if "embed" in name else tensor[0].numel() ** -0.5)
            elif tensor.ndim == 1:
                tensor.fill_(1.0 if name.endswith("weight") else 0.0)  # such weights are those of norms
            else:
                tensor.fill_(2.66)  # CLIP's logit_scale
    return network


def write_stable_diffusion(path: Path) -> None:
    from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    half = torch.float16
    parts: dict[str, Callable[[], Any]] = {
        "unet": lambda: UNet2DConditionModel(sample_size=64, cross_attention_dim=768),
        "vae": lambda: AutoencoderKL(
            sample_size=512,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
        ),
        "text_encoder": lambda: CLIPTextModel(
            CLIPTextConfig(
                hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
            )
        ),
    }
    for name, make in parts.items():
        random_weights(make, half).save_pretrained(path / name, variant="fp16")
    noise = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    PNDMScheduler(**noise, skip_prk_steps=True, steps_offset=1).save_pretrained(path / "scheduler")
    write_vocabulary(path / "tokenizer")
    CLIPTokenizer.from_pretrained(path / "tokenizer", model_max_length=77).save_pretrained(path / "tokenizer")


def write_clip(path: Path) -> None:
    """OpenAI's ViT-L/14 by its sizes."""
    from transformers import CLIPConfig, CLIPModel

    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
    vision |= {"num_attention_heads": 16, "patch_size": 14}
    text = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    config = CLIPConfig(vision_config=vision, text_config=text, projection_dim=768)
    random_weights(lambda: CLIPModel(config), torch.float32).save_pretrained(path)
    write_vocabulary(path)


def write_vocabulary(path: Path) -> None:
    """CLIP's vocab.json and merges.txt, from the list that open_clip brings along."""
    from open_clip.tokenizer import SimpleTokenizer

    path.mkdir(parents=True, exist_ok=True)
    tokenizer = SimpleTokenizer()
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {names.get(piece, piece): i for piece, i in tokenizer.encoder.items()}
    merges = [" ".join(pair) for pair in sorted(tokenizer.bpe_ranks, key=tokenizer.bpe_ranks.__getitem__)]
    (path / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")


def write_qalign(path: Path) -> None:
    config = json.loads(QALIGN.read_text(encoding="utf-8")) | {"num_hidden_layers": 2}
    random_weights(lambda: QAlign(config), torch.bfloat16).save(path)


# --- measuring ---


class Parts:
    """Seconds and peak of this process's own memory (without mapped files) in each part of the run."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.cpu: dict[str, float] = defaultdict(float)
        self.peak: dict[str, int] = defaultdict(int)
        self._open = ["start"]
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            self._note()
            time.sleep(0.2)

    def _note(self) -> None:
        part = self._open[-1]
        self.peak[part] = max(self.peak[part], own_memory())

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Name what runs inside. The backward pass is not split: what it computes again counts as its own."""
        if self._open[-1] == "backward":
            yield
            return
        self._open.append(name)
        start, cpu = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            self._note()
            self.seconds[name] += time.perf_counter() - start
            self.cpu[name] += time.process_time() - cpu
            self._open.pop()

    def wrap(self, owner: Any, function: str, name: str) -> None:
        """From now on `owner.function` counts as part `name`."""
        inner = getattr(owner, function)

        def timed(*arguments: Any, **options: Any) -> Any:
            with self.part(name):
                return inner(*arguments, **options)

        setattr(owner, function, timed)


def own_memory() -> int:
    """Bytes of anonymous memory of this process."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no RssAnon")


def measure(parts: Parts) -> None:
    """Hook into the trainer: its networks, once they are loaded, and the backward pass."""
    trainer: Any = loop
    build = trainer.build_state

    def build_state(*arguments: Any, **options: Any) -> Any:
        with parts.part("load, encode texts"):
            state = build(*arguments, **options)
        parts.wrap(state.sd.unet, "forward", "UNet, sampling")
        parts.wrap(state.sd.vae, "decode", "decode")
        parts.wrap(state.clip, "encode_image", "CLIP")
        parts.wrap(state.qalign, "score", "Q-Align")
        parts.wrap(state.generator_optimizer, "step", "AdamW")
        return state

    trainer.build_state = build_state
    parts.wrap(torch.Tensor, "backward", "backward")
    parts.wrap(loop, "save_checkpoint", "checkpoint")
    parts.wrap(loop, "_stage", "hash the weights")


# --- the run ---


def settings(networks: NetworkPaths, work: Path, steps: int) -> TrainConfig:
    (work / "classes.txt").write_text("\n".join(NAMES) + "\n", encoding="utf-8")
    recipe = load_recipe("sd15-imagenet1k", TrainConfig)
    return dataclasses.replace(
        recipe,
        networks=networks,
        classes=str(work / "classes.txt"),
        batch_size=1,
        max_updates=1,
        precision="bf16",
        device="cpu",
        rollout=dataclasses.replace(recipe.rollout, steps=steps, grad_steps=1, gradient_checkpointing=True),
        discriminator=dataclasses.replace(recipe.discriminator, warmup_updates=1),
        output=dataclasses.replace(recipe.output, grid_every=0),
    )


def run(work: Path, steps: int) -> dict[str, Any]:
    """One call of the trainer, up to the next checkpoint, with what it took; kept in `work`."""
    config = settings(write_weights(work), work, steps)
    parts = Parts()
    measure(parts)
    start, load = time.perf_counter(), os.getloadavg()[0]
    finished = train(config, work / "run", stop_after=1)
    used = {
        name: (parts.seconds[name], parts.cpu[name], parts.peak[name])
        for name in parts.peak
        if name in parts.seconds
    }
    return {
        "finished": finished,
        "steps": steps,
        "seconds": time.perf_counter() - start,
        "peak": max(parts.peak.values()),
        "load": (load, os.getloadavg()[0]),
        "parts": used,
    }


def check_lora(work: Path) -> str:
    """Diffusers' own pipeline loads the result: one line about it."""
    from diffusers import StableDiffusionPipeline

    sd = load_stable_diffusion(work / "sd15", torch.bfloat16)
    parts = (sd.vae, sd.text_encoder, sd.tokenizer, sd.unet, sd.scheduler)
    pipeline = StableDiffusionPipeline(*parts, safety_checker=None, feature_extractor=None)
    pipeline.load_lora_weights(work / "run")
    trained = {name: p for name, p in pipeline.unet.named_parameters() if "lora_B" in name}
    changed = sum(bool(parameter.any()) for parameter in trained.values())
    size = (work / "run" / LORA_FILE).stat().st_size / 1e6
    return (
        f"diffusers' `load_lora_weights` reads `{LORA_FILE}` ({size:.0f} MB): {len(trained)} layers, "
        f"of which {changed} differ from their start"
    )


def page(calls: list[dict[str, Any]], lora: str) -> str:
    versions = library_versions()
    shown = ", ".join(f"{name} {versions[name]}" for name in ("torch", "diffusers", "transformers", "peft"))
    lines = [
        "# Fine-tuning at real size on a CPU",
        "`python bench/finetune_sd15_cpu.py`: one warm-up update (2 images) and one training update (1 image) at "
        f"512 x 512, {calls[0]['steps']} sampling steps of which one carries gradient, LoRA of rank 128, gradient "
        "checkpointing, bf16. "
        "Random weights at real sizes: SD 1.5 (fp16 variants), CLIP ViT-L/14 (transformers directory), Q-Align at full "
        "width with 2 of its 32 decoder layers. Images and losses mean nothing here; times and memory do.",
        f"{device_name()}, {torch.get_num_threads()} thread(s), {shown}. Load of the machine "
        f"({os.cpu_count()} cores): "
        + "; ".join(
            f"{a:.1f} at the start and {b:.1f} at the end of a call" for a, b in (c["load"] for c in calls)
        )
        + ". Wall-clock times under load are no speed; processor seconds are nearer to it. "
        "Peaks are the process's own memory, without files mapped from disk. "
        "The backward pass computes UNet step, decoder and Q-Align again, which counts as its own.",
    ]
    lines = [textwrap.fill(line, 120) for line in lines]
    for call, title in zip(
        calls, ("First call: warm-up", "Second call, which resumes: training"), strict=False
    ):
        rows = [
            (name, f"{wall:.0f}", f"{cpu:.0f}", f"{peak / 1e9:.1f}")
            for name, (wall, cpu, peak) in call["parts"].items()
        ]
        rows.append(("all", f"{call['seconds']:.0f}", "", f"{call['peak'] / 1e9:.1f}"))
        header = ("part", "seconds", "processor seconds", "peak memory, GB")
        lines += [f"## {title}", markdown_table(header, rows)]
    lines += ["## The result", textwrap.fill(f"{lora[0].upper()}{lora[1:]}.", 120)]
    return "\n\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="directory for weights and the run")
    parser.add_argument("--steps", type=int, default=2, help="sampling steps")
    parser.add_argument("--markdown", type=Path, help="page to write")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    record = given.work / "calls.json"
    calls = json.loads(record.read_text(encoding="utf-8")) if record.exists() else []
    if not (calls and calls[-1]["finished"]):
        calls.append(run(given.work, given.steps))
        record.write_text(json.dumps(calls), encoding="utf-8")
    if not calls[-1]["finished"]:
        print("the first call is done; run the same command again, which resumes")
        return
    text = page(calls, check_lora(given.work))
    print(text)
    if given.markdown:
        given.markdown.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
