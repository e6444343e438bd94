import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from safetensors.torch import load_file, save_file

from ubgen.core.errors import UserError
from ubgen.diffusion import (
    StableDiffusion,
    check_stable_diffusion,
    encode_prompts,
    load_stable_diffusion,
    schedule,
    tokenize,
    with_sampler,
)

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1059962\n"


@pytest.fixture
def copy(reference: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(reference / "model", tmp_path / "model"))


def test_loaded_parts_are_frozen(tiny: StableDiffusion) -> None:
    assert tiny.latent_shape() == (4, 8, 8)
    for part in (tiny.unet, tiny.vae, tiny.text_encoder):
        assert not part.training
        assert not any(parameter.requires_grad for parameter in part.parameters())
    assert len(schedule(tiny.scheduler, 50)) == 51


def test_dtype_is_applied(reference: Path) -> None:
    sd = load_stable_diffusion(reference / "model", dtype=torch.bfloat16)
    assert {part.dtype for part in (sd.unet, sd.vae, sd.text_encoder)} == {torch.bfloat16}


def test_fp16_variant_loads(copy: Path) -> None:
    file = copy / "unet" / "diffusion_pytorch_model.safetensors"
    file.rename(file.with_name("diffusion_pytorch_model.fp16.safetensors"))
    assert load_stable_diffusion(copy).unet.dtype == torch.float32


def test_other_sampler_on_the_same_noise_schedule(tiny: StableDiffusion) -> None:
    ddpm = with_sampler(tiny.scheduler, "ddpm")
    assert isinstance(ddpm, DDPMScheduler)
    assert schedule(ddpm, 50) == schedule("ddpm", 50)
    with pytest.raises(UserError, match="euler"):
        with_sampler(tiny.scheduler, "euler")


def test_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unet: no such directory"):
        load_stable_diffusion(tmp_path / "nowhere")


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_missing_tensor(copy: Path, part: str) -> None:
    file = next((copy / part).glob("*.safetensors"))
    tensors = load_file(file)
    lost = sorted(tensors)[len(tensors) // 2]
    del tensors[lost]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"{part}.*{lost.removeprefix('text_model.')}"):
        load_stable_diffusion(copy)


def test_damaged_file(copy: Path) -> None:
    file = copy / "vae" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"vae/diffusion_pytorch_model\.safetensors is not a safetensors"):
        load_stable_diffusion(copy)


def test_missing_file(copy: Path) -> None:
    (copy / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"diffusion_pytorch_model\.safetensors: no such file"):
        load_stable_diffusion(copy)


def test_prompts_need_a_tokenizer(tiny: StableDiffusion) -> None:
    with pytest.raises(UserError, match="tokenizer"):
        encode_prompts(tiny, ["a"])


def changed(file: Path, **values: Any) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**content, **values}), encoding="utf-8")


@pytest.mark.parametrize(
    ("part", "values", "message"),
    [
        ("unet", {"in_channels": 9}, "takes 9 channels and predicts 4: an inpainting or editing model"),
        ("unet", {"addition_embed_type": "text_time"}, "addition_embed_type is 'text_time'; only UNets like"),
        ("unet", {"class_embed_type": "timestep"}, "class_embed_type is 'timestep'; only UNets like"),
        ("unet", {"cross_attention_dim": 1024}, "text embeddings of width 1024, the text encoder has"),
        ("text_encoder", {"hidden_size": 768}, r"the text encoder has 768; take both from one model"),
        (
            "vae",
            {"latent_channels": 16},
            "works on 4 latent channels, the VAE has 16; take both from one model",
        ),
    ],
)
def test_parts_that_do_not_fit_each_other_are_refused_by_their_configs(
    copy: Path, part: str, values: dict[str, Any], message: str
) -> None:
    changed(copy / part / "config.json", **values)
    with pytest.raises(UserError, match=message):
        check_stable_diffusion(copy)


@pytest.mark.parametrize(
    "name",
    [
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "scheduler/scheduler_config.json",
    ],
)
@pytest.mark.parametrize(
    ("content", "message"), [(LFS, "is a Git LFS pointer"), ("", "is empty"), ("[" * 9, "is not")]
)
def test_a_file_that_is_not_what_its_name_says(copy: Path, name: str, content: str, message: str) -> None:
    (copy / name).write_text(content, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        check_stable_diffusion(copy)
    assert str(caught.value).startswith(str(copy / name))
    assert message in str(caught.value)


def test_a_tokenizer_whose_files_are_missing_or_not_there_yet(copy: Path) -> None:
    directory = copy / "tokenizer"
    directory.mkdir()
    with pytest.raises(UserError, match=r"tokenizer/vocab\.json: no such file"):
        check_stable_diffusion(copy)
    (directory / "vocab.json").write_text('{"a": 0}')
    (directory / "merges.txt").write_text(LFS)
    with pytest.raises(UserError, match=r"merges\.txt is a Git LFS pointer"):
        check_stable_diffusion(copy)


def test_pickled_weights_come_with_the_line_that_converts_them(copy: Path) -> None:
    file = copy / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(file), file.with_suffix(".bin"))
    wanted = {name: tensor.clone() for name, tensor in load_file(file).items()}
    file.unlink()
    with pytest.raises(UserError, match="only pickled weights") as caught:
        load_stable_diffusion(copy)
    program = str(caught.value).split('python -c "')[1].removesuffix('"')
    exec(program)  # the line itself, as the user would run it
    assert {n: t.tolist() for n, t in load_file(file).items()} == {n: t.tolist() for n, t in wanted.items()}
    load_stable_diffusion(copy)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(copy: Path, part: str, value: float) -> None:
    file = next((copy / part).glob("*.safetensors"))
    tensors = load_file(file)
    name = sorted(tensors)[0]
    tensors[name].view(-1)[0] = value
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"holds NaN or infinity \(1 of ") as caught:
        load_stable_diffusion(copy)
    assert str(caught.value).startswith(str(file))
    assert name.removeprefix("text_model.") in str(caught.value)


@pytest.mark.parametrize(
    "kind", ["EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "LMSDiscreteScheduler"]
)
def test_a_scheduler_of_another_class_is_read_as_pndm_on_its_noise(copy: Path, kind: str) -> None:
    import diffusers

    noise = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    getattr(diffusers, kind)(**noise).save_pretrained(copy / "scheduler")
    assert schedule(load_stable_diffusion(copy).scheduler, 20) == schedule("pndm", 20)


def test_a_ddim_file_of_stable_diffusion_serves_pndm(copy: Path, tiny: StableDiffusion) -> None:
    from diffusers import DDIMScheduler

    DDIMScheduler.from_config(tiny.scheduler.config).save_pretrained(copy / "scheduler")
    assert schedule(with_sampler(load_stable_diffusion(copy).scheduler, "pndm"), 20) == schedule("pndm", 20)


@pytest.mark.parametrize("write", [lambda c: c.pop("beta_end"), lambda c: c.clear()])
def test_a_scheduler_without_a_noise_schedule(copy: Path, write: Callable[[dict[str, Any]], object]) -> None:
    file = copy / "scheduler" / "scheduler_config.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    write(content)
    file.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UserError, match=r"scheduler_config\.json: has no "):
        load_stable_diffusion(copy)


FP16 = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}


def outputs(sd: StableDiffusion) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, *sd.latent_shape(), generator=generator)
    prompt = sd.text_encoder(torch.tensor([[3, 1, 4, 1, 5]])).last_hidden_state
    with torch.no_grad():
        noise = sd.unet(latents, 501, prompt[:, :5].expand(2, -1, -1)).sample
        return [prompt.detach(), noise, sd.vae.decode(latents).sample]


def test_fp16_variants_of_all_parts_give_the_rounded_weights(copy: Path) -> None:
    """As `save_pretrained(variant="fp16")` writes them, with no other file beside them."""
    sd = load_stable_diffusion(copy)
    for name, part in (("unet", sd.unet), ("vae", sd.vae), ("text_encoder", sd.text_encoder)):
        part.half().save_pretrained(copy / name, variant="fp16")
        part.float()  # of rounded weights, which is what the files hold
        (copy / name / f"{FP16[name]}.safetensors").unlink()
        assert [file.name for file in (copy / name).glob("*.safetensors")] == [
            f"{FP16[name]}.fp16.safetensors"
        ]
    loaded = load_stable_diffusion(copy)
    assert {part.dtype for part in (loaded.unet, loaded.vae, loaded.text_encoder)} == {torch.float32}
    for mine, theirs in zip(outputs(loaded), outputs(sd), strict=True):
        torch.testing.assert_close(mine, theirs)


OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def test_attention_of_the_vae_by_its_old_names(copy: Path) -> None:
    """As in the files of Stable Diffusion 1.5 that were published first."""
    expected = outputs(load_stable_diffusion(copy))
    file = copy / "vae" / "diffusion_pytorch_model.safetensors"
    old = {}
    for name, tensor in load_file(file).items():
        for new, former in OLD_NAMES.items():
            name = name.replace(f".{new}.", f".{former}.")
        old[name] = tensor
    assert (
        sum(".proj_attn." in name for name in old) == 4
    )  # weight and bias, in the encoder and in the decoder
    save_file(old, file, {"format": "pt"})
    for mine, theirs in zip(outputs(load_stable_diffusion(copy)), expected, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_position_ids_in_the_text_encoder_are_passed_over(copy: Path) -> None:
    expected = outputs(load_stable_diffusion(copy))
    file = copy / "text_encoder" / "model.safetensors"
    tensors = load_file(file) | {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    save_file(tensors, file, {"format": "pt"})
    for mine, theirs in zip(outputs(load_stable_diffusion(copy)), expected, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_only_pickled_weights_are_converted_by_the_command_in_the_message(copy: Path) -> None:
    expected = outputs(load_stable_diffusion(copy))
    for name, stem in FP16.items():
        file = copy / name / f"{stem}.safetensors"
        pickled = "pytorch_model.bin" if name == "text_encoder" else "diffusion_pytorch_model.bin"
        torch.save(load_file(file), copy / name / pickled)
        file.unlink()
    for _ in FP16:
        with pytest.raises(UserError, match="has only pickled weights") as caught:
            load_stable_diffusion(copy)
        command = str(caught.value).partition("convert them once: ")[2]
        subprocess.run(shlex.split(command.replace("python", sys.executable, 1)), check=True)
    for mine, theirs in zip(outputs(load_stable_diffusion(copy)), expected, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_the_tokenizer_works_without_tokenizer_json(
    copy: Path, tmp_path: Path, write_transformers_clip: Callable[..., Path]
) -> None:
    """vocab.json, merges.txt and the settings as published give the ids that tokenizer.json gives."""
    source, tokenizer = write_transformers_clip(tmp_path / "clip"), copy / "tokenizer"
    tokenizer.mkdir(exist_ok=True)
    for name in ("vocab.json", "merges.txt"):
        shutil.copyfile(source / name, tokenizer / name)
    start, end = (
        {"__type": "AddedToken", "content": f"<|{word}oftext|>", "normalized": True}
        for word in ("start", "end")
    )
    settings = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": "<|endoftext|>"}
    settings |= {"model_max_length": 77, "tokenizer_class": "CLIPTokenizer", "do_lower_case": True}
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    sd = load_stable_diffusion(copy)
    texts = ["photo of a Crane", "", "drake's egg, 12 red wines " * 40]
    plain = tokenize(sd, texts)
    assert plain[0, 0] == 49406
    assert (plain[1, 1:] == 49407).all()
    sd.tokenizer.save_pretrained(tokenizer)
    (tokenizer / "vocab.json").unlink()
    torch.testing.assert_close(tokenize(load_stable_diffusion(copy), texts), plain)
