"""Exports: equal to PyTorch with the LoRA merged, done once, and refused when anything is wrong."""

import dataclasses
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torchvision.transforms.functional import to_tensor

from ubgen import runtime
from ubgen.core.errors import UserError
from ubgen.core.stage import Stage
from ubgen.dataset import open_dataset
from ubgen.diffusion import decode, encode_prompts, load_stable_diffusion, merge_lora
from ubgen.export import Exported, export_engine, load_spec, plan_export
from ubgen.rewards import Clip, QAlign
from ubgen.synth import SynthConfig
from ubgen.synth.synthesise import synthesise


def test_every_network_passed_within_its_tolerance(exported: Exported) -> None:
    assert {row.network for row in exported.parity} == set(runtime.load(exported.path))
    assert all(row.passed and row.rows >= 5 for row in exported.parity)


def test_the_engines_hold_the_merged_lora(exported: Exported, family: dict[str, str], lora: Path) -> None:
    engines = runtime.load(exported.path)
    sd = load_stable_diffusion(family["stable_diffusion"])
    ids = torch.tensor(sd.tokenizer(["ox", ""], padding="max_length", max_length=16).input_ids)
    context = engines["text_encoder"].run({"input_ids": ids})["embeddings"]
    assert (context - encode_prompts(sd, ["ox", ""])).abs().max() < 1e-4
    latents, timestep = torch.randn(2, 4, 8, 8), torch.tensor([901.0, 3.0])
    prompts = {"cond": context[:1].repeat(2, 1, 1), "uncond": context[1:]}
    inputs = {"latents": latents, "timestep": timestep, **prompts, "guidance": torch.tensor([2.5])}
    noise = engines["unet"].run(inputs)["noise"]

    @torch.no_grad()
    def guided() -> torch.Tensor:
        e_cond = sd.unet(latents, timestep, prompts["cond"]).sample
        e_uncond = sd.unet(latents, timestep, prompts["uncond"].expand(2, -1, -1)).sample
        return e_uncond + 2.5 * (e_cond - e_uncond)

    base = guided()
    merge_lora(sd.unet, lora)
    assert (noise - guided()).abs().max() < 1e-4
    assert (noise - base).abs().max() > 1e-2


def test_scores_are_those_of_pytorch_for_any_batch(exported: Exported, family: dict[str, str]) -> None:
    engines = runtime.load(exported.path)
    sd = load_stable_diffusion(family["stable_diffusion"])
    latents = torch.randn(7, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    pixels = engines["vae_decoder"].run({"latents": latents})["pixels"]
    with torch.no_grad():
        wanted = (decode(sd.vae, latents).clamp(0, 1) * 255).round().permute(0, 2, 3, 1)
    assert pixels.shape == (7, 64, 64, 3)
    assert (pixels.float() - wanted).abs().max() <= 1
    images = pixels.permute(0, 3, 1, 2).float() / 255
    clip, qalign = Clip.load(family["clip"]), QAlign.load(family["qalign"])
    features = torch.nn.functional.normalize(clip.encode_image(images), dim=-1)
    assert (engines["clip_image"].run({"pixels": pixels})["features"] - features).abs().max() < 1e-5
    assert (engines["qalign"].run({"pixels": pixels})["score"] - qalign.score(images)).abs().max() < 1e-5


def test_repeating_an_export_does_no_work(
    exported: Exported, family: dict[str, str], spec_file: Path, lora: Path
) -> None:
    before = {p: p.stat().st_mtime_ns for p in exported.path.rglob("*")}
    started = time.process_time()
    again = export_engine(load_spec(spec_file, **family), exported.path, lora)
    assert time.process_time() - started < 1
    assert (again.built, again.key, again.parity) == (False, exported.key, exported.parity)
    assert {p: p.stat().st_mtime_ns for p in exported.path.rglob("*")} == before


def test_the_plan_names_the_files_that_are_written(
    exported: Exported, family: dict[str, str], spec_file: Path, lora: Path
) -> None:
    planned = plan_export(load_spec(spec_file, **family), exported.path, lora)
    assert planned.complete
    assert planned.built == list(runtime.load(exported.path))
    assert all((exported.path / file).is_file() for network in planned.networks for file in network.files)
    other = plan_export(load_spec(spec_file, **family), exported.path)
    assert not other.complete
    assert set(planned.built) - set(other.built) == {"unet"}


class Stopped(Exception):
    """Raised by the listener, to save the rest of the work."""


def test_overwriting_the_very_same_engine_builds_it_anew(
    exported: Exported, family: dict[str, str], spec_file: Path, lora: Path, tmp_path: Path
) -> None:
    engine = Path(shutil.copytree(exported.path, tmp_path / "engine"))

    def stop(line: str) -> None:
        if "is here" in line or "compiling" in line:
            raise Stopped(line)

    with pytest.raises(Stopped, match="text_encoder: compiling"):
        export_engine(load_spec(spec_file, **family), engine, lora, overwrite=True, say=stop)
    assert not (engine / "manifest.json").exists()


def test_a_finished_engine_is_not_replaced_by_another(
    exported: Exported, family: dict[str, str], spec_file: Path, lora: Path
) -> None:
    with pytest.raises(
        UserError, match=r"another configuration \(lora was sha256:.*, now absent\); .*--overwrite"
    ):
        export_engine(load_spec(spec_file, **family), exported.path, lora=None)
    spec = load_spec(spec_file, **family)
    other = dataclasses.replace(spec, parity=dataclasses.replace(spec.parity, seed=1))
    with pytest.raises(UserError, match=r"another configuration \(spec was sha256:"):
        export_engine(other, exported.path, lora)
    assert runtime.load(exported.path).key == exported.key


def test_beyond_the_tolerance_nothing_is_finished(
    tmp_path: Path, family: dict[str, str], spec_file: Path, lora: Path
) -> None:
    spec = load_spec(spec_file, **family)
    strict = dataclasses.replace(spec.networks.text_encoder, tolerance=1e-12)
    spec = dataclasses.replace(spec, networks=dataclasses.replace(spec.networks, text_encoder=strict))
    with pytest.raises(UserError, match="text_encoder: the engine differs from PyTorch by"):
        export_engine(spec, tmp_path / "engine", lora)
    with pytest.raises(UserError, match="unfinished"):
        runtime.load(tmp_path / "engine")


def test_missing_inputs_are_named(tmp_path: Path, family: dict[str, str], spec_file: Path) -> None:
    with pytest.raises(UserError, match=r"--clip: .*not a directory"):
        export_engine(load_spec(spec_file, **{**family, "clip": str(tmp_path / "no")}), tmp_path / "out")
    with pytest.raises(UserError, match=r"--lora: .*pytorch_lora_weights\.safetensors"):
        export_engine(load_spec(spec_file, **family), tmp_path / "out", lora=tmp_path)
    broken = tmp_path / "sd"
    shutil.copytree(family["stable_diffusion"], broken)
    shutil.rmtree(broken / "tokenizer")
    with pytest.raises(UserError, match=r"--stable-diffusion: .* has no tokenizer"):
        export_engine(load_spec(spec_file, **{**family, "stable_diffusion": str(broken)}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_unfinished_training_run_is_refused(
    tmp_path: Path, family: dict[str, str], spec_file: Path, lora: Path
) -> None:
    stage = Stage(tmp_path / "train", "train", {})
    with stage.hold():
        stage.begin()
        shutil.copy(lora / "pytorch_lora_weights.safetensors", tmp_path / "train")
    with pytest.raises(UserError, match="train is unfinished"):
        export_engine(load_spec(spec_file, **family), tmp_path / "out", tmp_path / "train")


def test_a_lora_of_another_generator_is_refused(
    tmp_path: Path, family: dict[str, str], spec_file: Path, lora: Path
) -> None:
    stage = Stage(tmp_path / "train", "train", {})
    with stage.hold():
        stage.begin()
        shutil.copy(lora / "pytorch_lora_weights.safetensors", tmp_path / "train")
        stage.finish({"stable_diffusion": family["clip"]})
    with pytest.raises(UserError, match=r"train was trained on .*clip, not on the weights in"):
        export_engine(load_spec(spec_file, **family), tmp_path / "out", tmp_path / "train")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ("README.md", "image_size must be a multiple of 8 "),  # beyond the check, which came first
        (".cache/huggingface/download.lock", "image_size must be a multiple of 8 "),
        ("scheduler/scheduler_config.json", r"files in .*sd have changed since .*train was trained on it"),
    ],
)
def test_a_lora_whose_generator_has_changed_since_is_refused(
    tmp_path: Path, family: dict[str, str], spec_file: Path, lora: Path, changed: str, message: str
) -> None:
    """But not for files beside the weights that no stage reads."""
    sd = Path(shutil.copytree(family["stable_diffusion"], tmp_path / "sd"))
    stage = Stage(tmp_path / "train", "train", {})
    with stage.hold():
        stage.begin()
        shutil.copy(lora / "pytorch_lora_weights.safetensors", tmp_path / "train")
        stage.finish({"stable_diffusion": sd})
    (sd / changed).parent.mkdir(parents=True, exist_ok=True)
    with (sd / changed).open("a", encoding="utf-8") as file:
        file.write("\n")
    spec = load_spec(spec_file, **{**family, "stable_diffusion": str(sd)})
    with pytest.raises(UserError, match=message):
        export_engine(dataclasses.replace(spec, image_size=68), tmp_path / "out", tmp_path / "train")


def test_a_gpu_that_runs_out_of_memory_gets_one_line(
    tmp_path: Path, family: dict[str, str], spec_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compile_network(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2.00 GiB.")

    monkeypatch.setattr("ubgen.export.build.compile_network", compile_network)
    message = (
        r"^text_encoder: the GPU has too little memory; lower networks\.text_encoder\.batch\.max, or free"
    )
    with pytest.raises(UserError, match=message):
        export_engine(load_spec(spec_file, **family), tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_an_output_directory_in_use_is_refused(
    tmp_path: Path, family: dict[str, str], spec_file: Path
) -> None:
    spec = load_spec(spec_file, **family)
    with Stage(tmp_path / "out", "export", {}).hold(), pytest.raises(UserError, match="in use"):
        export_engine(spec, tmp_path / "out")


def test_clip_as_a_transformers_directory(
    exported: Exported,
    family: dict[str, str],
    spec_file: Path,
    lora: Path,
    class_file: str,
    tmp_path: Path,
    write_transformers_clip: Callable[..., Path],
) -> None:
    """The engine gets its tokenizer and no weights, and synthesis scores with it as PyTorch does."""
    torch.manual_seed(3)
    directory = write_transformers_clip(tmp_path / "clip")
    spec = load_spec(spec_file, **{**family, "clip": str(directory)})
    engine = Path(shutil.copytree(exported.path, tmp_path / "engine"))
    assert {plan.name for plan in plan_export(spec).networks} >= {"clip_image", "clip_text"}
    assert export_engine(spec, engine, lora, overwrite=True).built
    copied = {file.name for file in (engine / "clip").iterdir()}
    assert copied == {"config.json", "preprocessor_config.json", "vocab.json", "merges.txt"}
    out = tmp_path / "data"
    synthesise(SynthConfig(engine, class_file, per_class=1, out=str(out), steps=2, format="png"))
    samples, clip = list(open_dataset(out)), Clip.load(directory)
    images = torch.stack([to_tensor(sample.image) for sample in samples])
    texts = clip.encode_text([f"photo of {sample.class_name}" for sample in samples])
    similarity = torch.cosine_similarity(clip.encode_image(images), texts)
    stored = torch.tensor([sample.meta["clip_similarity"] for sample in samples])
    assert (stored - similarity).abs().max() < 1e-4
