"""Weights as people really have them: `ubgen-export --dry-run` finds what is wrong before anything is loaded."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ubgen.core.errors import UserError
from ubgen.export import Exported, export_engine, load_spec, plan_export

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1059962\n"
Copies = dict[str, Path]


@pytest.fixture
def copies(family: dict[str, str], tmp_path: Path) -> Copies:
    return {name: Path(shutil.copytree(path, tmp_path / name)) for name, path in family.items()}


def pointer(name: str) -> Callable[[Copies], None]:
    def write(copies: Copies) -> None:
        family, _, file = name.partition("/")
        (copies[family] / file).write_text(LFS, encoding="utf-8")

    return write


def config(name: str, **values: object) -> Callable[[Copies], None]:
    def write(copies: Copies) -> None:
        family, _, file = name.partition("/")
        path = copies[family] / file
        path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **values}))

    return write


def without(directory: str, *files: str) -> Callable[[Copies], None]:
    def remove(copies: Copies) -> None:
        family, _, inner = directory.partition("/")
        for file in files:
            (copies[family] / inner / file).unlink()

    return remove


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (pointer("stable_diffusion/tokenizer/vocab.json"), "vocab.json is a Git LFS pointer"),
        (pointer("stable_diffusion/tokenizer/merges.txt"), "merges.txt is a Git LFS pointer"),
        (
            pointer("stable_diffusion/text_encoder/model.safetensors"),
            "model.safetensors is a Git LFS pointer",
        ),
        (
            pointer("stable_diffusion/scheduler/scheduler_config.json"),
            "scheduler_config.json is a Git LFS pointer",
        ),
        (pointer("clip/open_clip_model.safetensors"), "open_clip_model.safetensors is a Git LFS pointer"),
        (pointer("clip/open_clip_config.json"), "open_clip_config.json is a Git LFS pointer"),
        (pointer("qalign/model.safetensors"), "model.safetensors is a Git LFS pointer"),
        (without("stable_diffusion/tokenizer", "tokenizer.json", "vocab.json"), "vocab.json: no such file"),
        (config("qalign/config.json", hidden_size=48), "config.json needs"),
        (config("stable_diffusion/unet/config.json", in_channels=9), "an inpainting or editing model"),
        (
            config("stable_diffusion/unet/config.json", addition_embed_type="text_time"),
            "addition_embed_type is",
        ),
        (config("stable_diffusion/vae/config.json", latent_channels=16), "the VAE has 16"),
        (config("stable_diffusion/text_encoder/config.json", hidden_size=48), "the text encoder has 48"),
    ],
)
def test_the_dry_run_names_the_file(
    copies: Copies, spec_file: Path, damage: Callable[[Copies], None], message: str
) -> None:
    spec = load_spec(spec_file, **copies)
    plan_export(spec)
    damage(copies)
    with pytest.raises(UserError) as caught:
        plan_export(spec)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_dry_run_reads_the_lora(copies: Copies, spec_file: Path, lora: Path, tmp_path: Path) -> None:
    spec = load_spec(spec_file, **copies)
    plan_export(spec, lora=lora)
    plan_export(spec, lora=lora / "pytorch_lora_weights.safetensors")
    tensors = load_file(lora / "pytorch_lora_weights.safetensors")
    save_file(tensors | {"text_encoder.x.lora.up.weight": torch.ones(1)}, tmp_path / "two.safetensors")
    with pytest.raises(UserError, match=r"'text_encoder\.x\.lora\.up\.weight' belongs to a text encoder"):
        plan_export(spec, lora=tmp_path / "two.safetensors")


@pytest.fixture
def engine(exported: Exported, tmp_path: Path) -> Path:
    """A finished engine of the family and its LoRA."""
    return Path(shutil.copytree(exported.path, tmp_path / "engine"))


def test_a_linked_part_is_known_by_its_bytes(
    copies: Copies, spec_file: Path, lora: Path, engine: Path, tmp_path: Path
) -> None:
    """The VAE is a link to a shared one. Turned to another, it is another engine."""
    shutil.move(copies["stable_diffusion"] / "vae", tmp_path / "vae-a")
    shutil.copytree(tmp_path / "vae-a", tmp_path / "vae-b")
    file = tmp_path / "vae-b" / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor * 1.01 for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    link = copies["stable_diffusion"] / "vae"
    link.symlink_to(tmp_path / "vae-a")
    spec = load_spec(spec_file, **copies)
    assert not export_engine(spec, engine, lora).built
    link.unlink()
    link.symlink_to(tmp_path / "vae-b")
    with pytest.raises(UserError, match=r"weights\.stable_diffusion was sha256:"):
        export_engine(spec, engine, lora)


def test_a_decoder_that_makes_one_colour_never_passes(
    copies: Copies, spec_file: Path, lora: Path, engine: Path
) -> None:
    """Both sides would be black, and as equal as can be."""
    file = copies["stable_diffusion"] / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors |= {
        name: torch.zeros_like(t) for name, t in tensors.items() if name.startswith("decoder.conv_out")
    }
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(
        UserError, match=r"vae_decoder: PyTorch's own output is .*; the weights cannot be right"
    ):
        export_engine(load_spec(spec_file, **copies), engine, lora, overwrite=True)
    assert not (engine / "manifest.json").exists()
