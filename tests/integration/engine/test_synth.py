"""Synthesis: the same images however they are batched or interrupted, and nothing finished is ever lost."""

import dataclasses
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ubgen.dataset import open_dataset
from ubgen.diffusion import decode, encode_prompts, initial_noise, load_stable_diffusion, merge_lora, sample
from ubgen.errors import UserError
from ubgen.export import Exported
from ubgen.manifest import read_manifest, stage_directory
from ubgen.rewards import Clip, QAlign
from ubgen.synth import SynthConfig, synthesise

NAMES = ("crane", "red wine", "drake's egg", "stop sign", "ox")
STEPS = 4


@pytest.fixture(scope="module")
def config(exported: Exported, class_file: str, tmp_path_factory: pytest.TempPathFactory) -> SynthConfig:
    out = tmp_path_factory.mktemp("data") / "dataset"
    return SynthConfig(
        exported.path, class_file, per_class=4, out=out, batch=4, steps=STEPS, shard_size=6, format="png"
    )


@pytest.fixture(scope="module")
def dataset(config: SynthConfig) -> Path:
    """The undisturbed run: 5 classes x 4 images in shards of 6, 6, 6 and 2."""
    synthesise(config)
    return config.out


def shards(out: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(out.glob("shard-*"))}


def command(config: SynthConfig) -> list[str]:
    options = {
        "engine": config.engine,
        "classes": config.classes,
        "per-class": config.per_class,
        "out": config.out,
        "batch": config.batch,
        "steps": config.steps,
        "shard-size": config.shard_size,
        "format": config.format,
    }
    start = [sys.executable, "-c", "from ubgen.cli.synth import main; main()"]
    return start + [part for name, value in options.items() for part in (f"--{name}", str(value))]


def test_the_dataset_is_whole_and_described(dataset: Path) -> None:
    samples = open_dataset(dataset)
    assert len(samples) == 20
    assert [s.label for s in samples] == [0, 1, 2, 3, 4] * 4
    assert samples[7].meta["identity"] == {"seed": 0, "class_index": 2, "image_index": 1}
    assert samples[7].class_name == samples[7].meta["prompt"] == "drake's egg"
    manifest = read_manifest(dataset, "synth")
    scores = [entry["quality"] for entry in samples.entries()]
    assert manifest["stats"]["quality"]["mean"] == pytest.approx(sum(scores) / 20)
    assert all(1 <= score <= 5 for score in scores)
    sheet = Image.open(dataset / "contact-sheet.png")
    assert sheet.size == (150 + 4 * 100, 5 * 100 + 4)
    assert (dataset / "README.md").read_text(encoding="utf-8").startswith("---\n")


def test_images_and_scores_are_those_of_pytorch(dataset: Path, family: dict[str, str], lora: Path) -> None:
    """The whole chain against PyTorch, from the identities alone."""
    sd = load_stable_diffusion(family["stable_diffusion"])
    merge_lora(sd.unet, lora)
    noise = torch.stack([initial_noise(0, label, image, (4, 8, 8)) for image in (0, 1) for label in range(5)])
    cond, uncond = encode_prompts(sd, NAMES * 2), encode_prompts(sd, [""])
    latents = sample(sd.unet, sd.scheduler, noise, cond, uncond, steps=STEPS, guidance=2.0)
    with torch.no_grad():
        wanted = (decode(sd.vae, latents).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    samples = open_dataset(dataset)[:10]
    pixels = torch.stack([torch.tensor(np.asarray(s.image)) for s in samples])
    assert ((pixels.int() - wanted.int()).abs() <= 1).float().mean() >= 0.999
    images = pixels.permute(0, 3, 1, 2).float() / 255
    clip, qalign = Clip.load(family["clip"]), QAlign.load(family["qalign"])
    texts = clip.encode_text([f"photo of {name}" for name in NAMES * 2])
    similarity = torch.cosine_similarity(clip.encode_image(images), texts)
    stored = torch.tensor([[s.meta["clip_similarity"], s.meta["quality"]] for s in samples])
    assert (stored[:, 0] - similarity).abs().max() < 1e-4
    assert (stored[:, 1] - qalign.score(images)).abs().max() < 1e-4


def test_batch_and_shards_do_not_change_the_images(
    config: SynthConfig, dataset: Path, tmp_path: Path
) -> None:
    other = dataclasses.replace(config, out=tmp_path / "other", batch=7, shard_size=20)
    synthesise(other)
    for ours, theirs in zip(open_dataset(dataset), open_dataset(other.out), strict=True):
        assert ours.meta["identity"] == theirs.meta["identity"]
        difference = np.abs(np.asarray(ours.image, int) - np.asarray(theirs.image, int))
        assert (difference <= 1).mean() >= 0.999


def test_another_seed_gives_other_images(config: SynthConfig, dataset: Path, tmp_path: Path) -> None:
    other = dataclasses.replace(config, out=tmp_path / "other", seed=1, per_class=1)
    synthesise(other)
    ours, theirs = (np.asarray(open_dataset(path)[0].image, int) for path in (dataset, other.out))
    assert np.abs(ours - theirs).mean() > 1


def test_killed_and_continued_gives_the_same_bytes(
    config: SynthConfig, dataset: Path, tmp_path: Path
) -> None:
    killed = dataclasses.replace(config, out=tmp_path / "killed")
    process = subprocess.Popen(command(killed), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (killed.out / ".shard-000001.tar.tmp").exists():
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (killed.out / "shard-000000.json").exists()
    assert not (killed.out / "manifest.json").exists()
    with pytest.raises(UserError, match=r"another --seed \(0 there, 5 now\)"):
        synthesise(dataclasses.replace(killed, seed=5))
    kept = (killed.out / "shard-000000.tar").stat().st_mtime_ns
    seen: list[tuple[int, int]] = []
    result = synthesise(killed, lambda done, total: seen.append((done, total)))
    assert result.made < result.images
    assert seen[0] == (20 - result.made, 20)
    assert seen[-1] == (20, 20)
    assert (killed.out / "shard-000000.tar").stat().st_mtime_ns == kept
    assert shards(killed.out) == shards(dataset)


def test_a_full_disk_keeps_what_is_finished(config: SynthConfig, dataset: Path, tmp_path: Path) -> None:
    """A limit on file sizes, set after the first shard, makes writes fail as a full disk does."""
    limited = dataclasses.replace(config, out=tmp_path / "limited")
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill_disk(done: int, total: int) -> None:
        if done == 6:
            resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(OSError, match=r"shard-00000\d\.tar"):
            synthesise(limited, fill_disk)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(limited.out.glob(".shard-*"))
    synthesise(limited)
    assert shards(limited.out) == shards(dataset)


def test_the_command_ends_with_one_line(config: SynthConfig, dataset: Path, tmp_path: Path) -> None:
    limited = dataclasses.replace(config, out=tmp_path / "limited")
    result = subprocess.run(
        command(limited),
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000)),
    )
    assert result.returncode == 2
    assert [line for line in result.stderr.splitlines() if line.startswith("error: ")] != []
    assert "Traceback" not in result.stderr
    assert "shard-000000.tar" in result.stderr


def test_a_finished_dataset_is_kept(config: SynthConfig, dataset: Path) -> None:
    before = shards(dataset)
    with pytest.raises(UserError, match="--overwrite"):
        synthesise(config)
    assert shards(dataset) == before


def test_overwriting_makes_another(config: SynthConfig, dataset: Path, tmp_path: Path) -> None:
    small = dataclasses.replace(config, out=tmp_path / "d", per_class=2)
    synthesise(small)
    synthesise(dataclasses.replace(small, per_class=1, seed=3, overwrite=True))
    assert len(open_dataset(small.out)) == 5
    assert json.loads((small.out / "run.json").read_text(encoding="utf-8"))["--seed"] == 3


def test_a_directory_in_use_is_refused(config: SynthConfig, tmp_path: Path) -> None:
    busy = dataclasses.replace(config, out=tmp_path / "busy")
    with stage_directory(busy.out, "synth", {}), pytest.raises(UserError, match="in use"):
        synthesise(busy)
    assert [p.name for p in busy.out.iterdir()] == [".lock"]


def test_wrong_engine_or_batch_is_named(config: SynthConfig, tmp_path: Path) -> None:
    fresh = dataclasses.replace(config, out=tmp_path / "out")
    with pytest.raises(UserError, match="unfinished or not a ubgen export directory"):
        synthesise(dataclasses.replace(fresh, engine=tmp_path))
    with pytest.raises(UserError, match=r"--batch 200: the UNet .* takes 1 to 128 images"):
        synthesise(dataclasses.replace(fresh, batch=200))
    with pytest.raises(UserError, match="neither a file nor"):
        synthesise(dataclasses.replace(fresh, classes="no-such-list"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_directory_is_refused(config: SynthConfig, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="cannot write"):
        synthesise(dataclasses.replace(config, out=tmp_path / "out"))
