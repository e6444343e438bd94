"""Synthesis: the same images however they are batched or interrupted, and nothing finished is ever lost."""

import dataclasses
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ubgen.core.errors import UserError
from ubgen.core.files import open_store
from ubgen.core.locks import hold
from ubgen.core.stage import read_manifest, read_run
from ubgen.dataset import open_dataset
from ubgen.diffusion import decode, encode_prompts, initial_noise, load_stable_diffusion, merge_lora, sample
from ubgen.export import Exported
from ubgen.rewards import Clip, QAlign
from ubgen.synth import SynthConfig
from ubgen.synth.audit import audit
from ubgen.synth.synthesise import synthesise

NAMES = ("crane", "red wine", "drake's egg", "stop sign", "ox")
STEPS = 4


@pytest.fixture(scope="module")
def config(exported: Exported, class_file: str, tmp_path_factory: pytest.TempPathFactory) -> SynthConfig:
    out = str(tmp_path_factory.mktemp("data") / "dataset")
    return SynthConfig(
        exported.path, class_file, per_class=4, out=out, batch=4, steps=STEPS, shard_size=6, format="png"
    )


@pytest.fixture(scope="module")
def dataset(config: SynthConfig) -> Path:
    """The undisturbed run: 5 classes x 4 images in shards of 6, 6, 6 and 2."""
    synthesise(config)
    return Path(config.out)


def shards(out: str | Path) -> dict[str, bytes]:
    """Everything about the samples; what describes them beside it may hold times and paths."""
    return {p.name: p.read_bytes() for p in sorted(Path(out).glob("shard-*"))}


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


def test_the_dataset_is_whole_and_described(config: SynthConfig, dataset: Path) -> None:
    samples = open_dataset(dataset)
    assert len(samples) == 20
    assert [s.label for s in samples] == [0, 1, 2, 3, 4] * 4
    assert samples[7].meta["identity"] == {
        "seed": 0,
        "class_index": 2,
        "image_index": 1,
        "attempt": 0,
    }
    assert samples[7].class_name == samples[7].meta["prompt"] == "drake's egg"
    manifest = read_manifest(dataset, "synth")
    scores = [entry.scores["quality"] for entry in samples.entries()]
    assert manifest["stats"]["quality"]["mean"] == pytest.approx(sum(scores) / 20)
    assert all(1 <= score <= 5 for score in scores)
    pictures = ["contact-sheet.png", "contact-sheets/drake-s-egg.png", "scores.png", "throughput.png"]
    assert all(Image.open(dataset / name).size > (100, 100) for name in pictures)
    assert (dataset / "README.md").read_text(encoding="utf-8").startswith("---\n")
    assert (dataset / "rejections.jsonl").read_bytes() == b""
    speed = manifest["speed"]
    assert set(speed["busy_seconds"]) == {"denoise", "decode", "score", "select", "encode", "write"}
    assert sum(speed["bottleneck_shares"].values()) == pytest.approx(1)
    assert speed["throughput"][-1][1] == 20
    engine = read_manifest(config.engine, "export")
    best = engine["engine"]["networks"]["unet"]["signature"]["inputs"][0]["shape"][0]["best"]
    assert manifest["same_bits"] == engine["same_bits"] == {"batch": best, "position": True, "size": True}


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
    features = torch.from_numpy(open_dataset(dataset).features()[:10]).float()
    assert (features - torch.nn.functional.normalize(clip.encode_image(images))).abs().max() < 1e-3


def test_batch_and_shards_do_not_change_the_images(
    config: SynthConfig, dataset: Path, tmp_path: Path
) -> None:
    other = dataclasses.replace(config, out=str(tmp_path / "other"), batch=7, shard_size=20)
    synthesise(other)
    for ours, theirs in zip(open_dataset(dataset), open_dataset(other.out), strict=True):
        assert ours.meta["identity"] == theirs.meta["identity"]
        difference = np.abs(np.asarray(ours.image, int) - np.asarray(theirs.image, int))
        assert (difference <= 1).mean() >= 0.999


def test_images_are_those_of_diffusers_pipeline(dataset: Path, family: dict[str, str], lora: Path) -> None:
    """From the same initial latents, with diffusers' own PNDM, guidance, text encoding and decoding."""
    from diffusers import StableDiffusionPipeline

    sd = load_stable_diffusion(family["stable_diffusion"])
    pipeline = StableDiffusionPipeline(
        sd.vae,
        sd.text_encoder,
        sd.tokenizer,
        sd.unet,
        sd.scheduler,
        None,
        None,
        requires_safety_checker=False,
    )
    pipeline.load_lora_weights(lora)
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.stack([initial_noise(0, label, 0, (4, 8, 8)) for label in range(5)])
    images = pipeline(
        prompt=list(NAMES),
        negative_prompt=[""] * 5,
        latents=noise,
        num_inference_steps=STEPS,
        guidance_scale=2.0,
        output_type="np",
    ).images
    wanted = (255 * images).round()
    pixels = np.stack([np.asarray(s.image) for s in open_dataset(dataset)[:5]])
    assert (np.abs(pixels - wanted) <= 1).mean() >= 0.999


@pytest.mark.parametrize(
    "change",
    [{"workers": 2}, {"workers": 1, "batch": 3}],
    ids=["two processes", "another batch"],
)
def test_any_number_of_workers_gives_the_same_bytes(
    config: SynthConfig, dataset: Path, tmp_path: Path, change: dict[str, object]
) -> None:
    other = dataclasses.replace(config, out=str(tmp_path / "other"), **change)
    result = synthesise(other)
    assert (result.complete, result.made) == (True, 20)
    assert shards(other.out) == shards(dataset)


def test_parts_of_a_static_run_make_one_dataset(config: SynthConfig, dataset: Path, tmp_path: Path) -> None:
    """One after the other, the last part twice, as a job array that is queued again would."""
    parts = [
        dataclasses.replace(config, out=str(tmp_path / "parts"), executor="static", part=f"{i}/3")
        for i in (1, 2, 3)
    ]
    first, second = synthesise(parts[2]), synthesise(parts[0])
    assert (first.complete, second.complete) == (False, False)
    assert (first.made, second.made) == (6, 6 + 2)
    assert not synthesise(parts[2]).made
    with pytest.raises(UserError, match="unfinished or not a ubgen synth or convert directory"):
        open_dataset(tmp_path / "parts")
    last = synthesise(parts[1])
    assert (last.complete, last.made) == (True, 6)
    assert shards(tmp_path / "parts") == shards(dataset)
    again = synthesise(parts[0])
    assert (again.found, again.complete, again.made) == (True, True, 0)


def test_images_that_are_not_good_enough_are_drawn_again(
    config: SynthConfig, dataset: Path, tmp_path: Path
) -> None:
    """The threshold is the median of the undisturbed run: about half of the images need another attempt."""
    median = float(np.median([e.scores["clip_similarity"] for e in open_dataset(dataset).entries()]))
    picky = dataclasses.replace(config, out=str(tmp_path / "picky"), min_similarity=median, attempts=4)
    synthesise(picky)
    samples = open_dataset(picky.out)
    entries = list(samples.entries())
    assert len(entries) == 20
    assert all(e.scores["clip_similarity"] >= median or e.flag == "similarity" for e in entries)
    assert any(
        e.scores["clip_similarity"] >= median and s.meta["identity"]["attempt"]
        for e, s in zip(entries, samples, strict=True)
    )
    ledger = [json.loads(line) for line in (tmp_path / "picky" / "rejections.jsonl").read_text().splitlines()]
    assert len(ledger) >= 8
    assert all(line["clip_similarity"] < median and line["reason"] == "similarity" for line in ledger)
    attempts = {(line["class_index"], line["image_index"], line["attempt"]) for line in ledger}
    assert len(attempts) == len(ledger)
    assert audit(picky.out, sample=20).same_bytes == 20


def test_a_failing_threshold_ends_with_one_line(config: SynthConfig, tmp_path: Path) -> None:
    """The error comes from one of two processes."""
    hopeless = dataclasses.replace(
        config, out=str(tmp_path / "out"), min_quality=5.0, attempts=2, exhausted="fail", workers=2
    )
    with pytest.raises(UserError, match=r"none of 2 attempts is good enough .* Q-Align score") as failed:
        synthesise(hopeless)
    ledgers = list((tmp_path / "out").glob("exhausted-*.jsonl"))
    for ledger in ledgers:
        lines = [json.loads(line) for line in ledger.read_text(encoding="utf-8").splitlines()]
        assert [(line["seed"], line["attempt"], line["reason"]) for line in lines] == [
            (0, 0, "quality"),
            (0, 1, "quality"),
        ]
    assert any(f"({ledger} lists its draws)" in str(failed.value) for ledger in ledgers)


def test_audit_renders_again_and_finds_what_was_changed(
    config: SynthConfig, dataset: Path, tmp_path: Path
) -> None:
    found = audit(dataset, sample=12)
    assert (found.samples, found.same_bytes, found.within, found.largest) == (12, 12, 1.0, 0)
    assert found.passed
    assert found.same_engine
    copy = tmp_path / "copy"
    shutil.copytree(dataset, copy)
    places = [entry.image for entry in open_dataset(copy).shards[0].samples()]
    longer, shorter = sorted(range(6), key=lambda i: -places[i][1])[
        :2
    ]  # the bytes after a PNG's end do not count
    data = bytearray((copy / "shard-000000.tar").read_bytes())
    (to, room), (start, size) = places[longer], places[shorter]
    data[to : to + room] = data[start : start + size].ljust(room, b"\0")
    (copy / "shard-000000.tar").write_bytes(data)
    changed = audit(copy, sample=20)
    assert changed.differing == [f"{longer:09d}"]
    assert not changed.passed


def test_audit_encodes_as_the_run_did(config: SynthConfig, tmp_path: Path) -> None:
    """The manifest is made to tell of a run on a GPU, once with each of its encoders."""
    jpegs = dataclasses.replace(config, out=str(tmp_path / "jpegs"), format="jpg", per_class=1)
    synthesise(jpegs)
    assert audit(jpegs.out).same_bytes == 5
    file = tmp_path / "jpegs" / "manifest.json"
    manifest = json.loads(file.read_text(encoding="utf-8"))
    manifest["config"] |= {"device": "cuda", "encoder": "cpu"}
    file.write_text(json.dumps(manifest), encoding="utf-8")
    assert audit(jpegs.out).same_bytes == 5
    manifest["config"]["encoder"] = "auto"
    file.write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(UserError, match=r"--device cpu: nvjpeg encoded .*; audit it with --device cuda"):
        audit(jpegs.out)


def test_prompts_of_classes_can_be_replaced(config: SynthConfig, dataset: Path, tmp_path: Path) -> None:
    overrides = tmp_path / "prompts.tsv"
    overrides.write_text("crane\tcrane, a bird", encoding="utf-8")
    other = dataclasses.replace(config, out=str(tmp_path / "other"), prompts=overrides)
    synthesise(other)
    pairs = list(zip(open_dataset(dataset), open_dataset(other.out), strict=True))
    assert [theirs.meta["prompt"] for _, theirs in pairs[:2]] == ["crane, a bird", "red wine"]
    changed = {ours.label for ours, theirs in pairs if ours.image.tobytes() != theirs.image.tobytes()}
    assert changed == {0}


def test_another_seed_gives_other_images(config: SynthConfig, dataset: Path, tmp_path: Path) -> None:
    other = dataclasses.replace(config, out=str(tmp_path / "other"), seed=1, per_class=1)
    synthesise(other)
    ours, theirs = (np.asarray(open_dataset(path)[0].image, int) for path in (dataset, other.out))
    assert np.abs(ours - theirs).mean() > 1


def test_killed_and_continued_gives_the_same_bytes(
    config: SynthConfig, dataset: Path, tmp_path: Path
) -> None:
    out = tmp_path / "killed"
    killed = dataclasses.replace(config, out=str(out))
    process = subprocess.Popen(command(killed), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (out / "shard-000000.json").exists():
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "manifest.json").exists()
    (out / "shard-000003.json").unlink(
        missing_ok=True
    )  # so that there is something to do, however quick it was
    with pytest.raises(UserError, match=r"another configuration \(--seed was 0, now 5\)"):
        synthesise(dataclasses.replace(killed, seed=5))
    kept = (out / "shard-000000.tar").stat().st_mtime_ns
    seen: list[tuple[int, int]] = []
    result = synthesise(killed, lambda done, total, note="": seen.append((done, total)))
    assert result.made < result.images
    assert seen[0] == (20 - result.made, 20)
    assert seen[-1] == (20, 20)
    assert (out / "shard-000000.tar").stat().st_mtime_ns == kept
    assert shards(out) == shards(dataset)


def test_a_full_disk_keeps_what_is_finished(config: SynthConfig, dataset: Path, tmp_path: Path) -> None:
    """A limit on file sizes, set after the first shard, makes writes fail as a full disk does."""
    limited = dataclasses.replace(config, out=str(tmp_path / "limited"))
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill_disk(done: int, total: int, note: str = "") -> None:
        if done >= 6:
            resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(OSError, match=r"shard-00000\d\.tar"):
            synthesise(limited, fill_disk)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(Path(limited.out).glob(".shard-*"))
    synthesise(limited)
    assert shards(limited.out) == shards(dataset)


def test_the_command_ends_with_one_line(config: SynthConfig, dataset: Path, tmp_path: Path) -> None:
    limited = dataclasses.replace(config, out=str(tmp_path / "limited"))
    result = subprocess.run(
        command(limited),
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000)),
    )
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    # two shards are made at a time, so that either may meet the limit first
    assert re.match(r"error: .*shard-00000\d\.tar", line)


def test_a_finished_dataset_is_kept(config: SynthConfig, dataset: Path) -> None:
    """The same command again only shows its figures; another run is refused."""
    before = {path: path.stat().st_mtime_ns for path in dataset.rglob("*") if path.name != ".lock"}
    result = subprocess.run(command(config), capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "20 images in" in result.stdout
    assert "finished already, made at" in result.stdout
    stats = read_manifest(dataset, "synth")["stats"]
    assert f"mean CLIP similarity {stats['clip_similarity']['mean']:.4f}" in result.stdout
    found = synthesise(config)
    assert (found.found, found.complete, found.made, found.stats) == (True, True, 0, stats)
    with pytest.raises(UserError, match=r"holds a finished run .*--seed was 0, now 1.* pass --overwrite"):
        synthesise(dataclasses.replace(config, seed=1))
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_overwriting_makes_another(config: SynthConfig, dataset: Path, tmp_path: Path) -> None:
    small = dataclasses.replace(config, out=str(tmp_path / "d"), per_class=2, base_model="some/model")
    synthesise(small)
    synthesise(dataclasses.replace(small, per_class=1, seed=3, overwrite=True))
    assert len(open_dataset(small.out)) == 5
    assert read_run(small.out, "synth")["--seed"] == 3
    assert read_manifest(small.out, "synth")["base_model"] == "some/model"
    assert read_manifest(dataset, "synth")["base_model"] == "stable-diffusion"
    for name in ("README.md", "croissant.json"):
        assert "some/model" in (tmp_path / "d" / name).read_text(encoding="utf-8")


def test_a_directory_in_use_is_refused(config: SynthConfig, tmp_path: Path) -> None:
    busy = dataclasses.replace(config, out=str(tmp_path / "busy"))
    with hold(open_store(busy.out)), pytest.raises(UserError, match="in use"):
        synthesise(busy)
    assert [p.name for p in (tmp_path / "busy").iterdir()] == [".lock"]


def test_wrong_engine_or_batch_is_named(config: SynthConfig, tmp_path: Path) -> None:
    fresh = dataclasses.replace(config, out=str(tmp_path / "out"))
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
        synthesise(dataclasses.replace(config, out=str(tmp_path / "out")))
