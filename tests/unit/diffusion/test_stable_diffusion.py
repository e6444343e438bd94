import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler
from safetensors.torch import load_file, save_file

from ubgen.core.errors import UserError
from ubgen.diffusion import StableDiffusion, encode_prompts, load_stable_diffusion, schedule, with_sampler


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
    with pytest.raises(UserError, match="vae: cannot load AutoencoderKL"):
        load_stable_diffusion(copy)


def test_missing_file(copy: Path) -> None:
    (copy / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"diffusion_pytorch_model\.safetensors: no such file"):
        load_stable_diffusion(copy)


def test_prompts_need_a_tokenizer(tiny: StableDiffusion) -> None:
    with pytest.raises(UserError, match="tokenizer"):
        encode_prompts(tiny, ["a"])
