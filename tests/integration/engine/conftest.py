"""One engine for all tests here: compiled from a complete family of tiny random networks in the real formats."""

import fcntl
import json
import os
import string
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ubgen.core.files import atomic_write
from ubgen.export import Exported, export_engine, load_spec

GOLDEN = Path(__file__).resolve().parents[2] / "golden"
NAMES = ("crane", "red wine", "drake's egg", "stop sign", "ox")


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Directories by the name of their option; random weights, 64x64 images."""
    root = tmp_path_factory.mktemp("family")
    torch.manual_seed(0)
    write_stable_diffusion(root / "stable-diffusion")
    write_clip(root / "clip")
    write_qalign(root / "qalign")
    return {
        "stable_diffusion": str(root / "stable-diffusion"),
        "clip": str(root / "clip"),
        "qalign": str(root / "qalign"),
    }


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that all processes of a parallel run have in common."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def class_file(shared: Path) -> str:
    path = shared / "classes.txt"
    atomic_write(path, "\n".join(NAMES))
    return str(path)


@pytest.fixture(scope="session")
def spec_file(tmp_path_factory: pytest.TempPathFactory, class_file: str) -> Path:
    """The miniature's spec, with our class list and fewer images for the parity inputs."""
    path = tmp_path_factory.mktemp("spec") / "tiny.toml"
    parity = f"[parity]\nclasses = {json.dumps(class_file)}\nimages = 6\nsteps = 4\n"
    path.write_text(f'extends = "miniature"\n{parity}', encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def half_spec(spec_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The decoder in float16, and images that may differ as much as float16 does."""
    path = tmp_path_factory.mktemp("half") / "half.toml"
    decoder = '[networks.vae_decoder]\nprecision = "float16"\ntolerance = 2e-2\n'
    images = "[parity.chain]\npsnr = 40.0\nwithin_one_level = 0.95\n"
    path.write_text(f"extends = {json.dumps(str(spec_file))}\n{decoder}{images}", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def lora(tmp_path_factory: pytest.TempPathFactory, family: dict[str, str]) -> Path:
    """A LoRA that visibly changes the UNet."""
    from diffusers import UNet2DConditionModel

    from ubgen.diffusion import add_lora, save_lora

    unet = UNet2DConditionModel.from_pretrained(Path(family["stable_diffusion"]) / "unet")
    for parameter in add_lora(unet, rank=2):
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(1))
    directory = tmp_path_factory.mktemp("lora")
    save_lora(unet, directory)
    return directory


@pytest.fixture(scope="session")
def exported(shared: Path, family: dict[str, str], spec_file: Path, lora: Path) -> Exported:
    """Compiled by the first process that asks for it: the others have equal weights, so their engine has its key."""
    with (shared / "engine.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return export_engine(load_spec(spec_file, **family), shared / "engine", lora)


def write_stable_diffusion(path: Path) -> None:
    from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(32,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=8,
    ).save_pretrained(path / "unet")
    AutoencoderKL(
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=4,
    ).save_pretrained(path / "vae")
    tokens = write_tokenizer(path / "tokenizer")
    CLIPTextModel(
        CLIPTextConfig(
            vocab_size=tokens,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=16,
            bos_token_id=tokens - 2,
            eos_token_id=tokens - 1,
        )
    ).save_pretrained(path / "text_encoder")
    PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        steps_offset=1,
        set_alpha_to_one=False,
    ).save_pretrained(path / "scheduler")


def write_tokenizer(path: Path) -> int:
    """One token for each character; returns the size of the vocabulary."""
    from transformers import CLIPTokenizer

    characters = string.ascii_lowercase + string.digits + string.punctuation
    pieces = [*characters, *(f"{c}</w>" for c in characters), "<|startoftext|>", "<|endoftext|>"]
    path.mkdir(parents=True)
    (path / "vocab.json").write_text(
        json.dumps({piece: i for i, piece in enumerate(pieces)}), encoding="utf-8"
    )
    (path / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    CLIPTokenizer.from_pretrained(path, model_max_length=16).save_pretrained(path)
    return len(pieces)


def write_clip(path: Path) -> None:
    import open_clip

    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 8, "patch_size": 16},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    path.mkdir(parents=True)
    text = json.dumps({"model_cfg": config, "preprocess_cfg": {}})
    (path / "open_clip_config.json").write_text(text, encoding="utf-8")
    tensors = open_clip.model.CLIP(**config).state_dict()
    save_file({name: t.contiguous() for name, t in tensors.items()}, path / "open_clip_model.safetensors")


def write_qalign(path: Path) -> None:
    from ubgen.rewards import QAlign

    config = json.loads((GOLDEN / "qalign" / "config.json").read_text(encoding="utf-8"))
    visual = config["visual_config"]
    for part in (config, visual["visual_model"], visual["visual_abstractor"]):
        part["num_hidden_layers"] = 1
    config["scoring"]["prompt_ids"] = [1, 5, 7, config["scoring"]["image_token_index"], 9, 11]
    QAlign.from_config(config).save(path)
