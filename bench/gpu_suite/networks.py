"""Random networks, created on the device in their final precision: no copy on the host, nothing downloaded."""

from typing import Any

import torch
from torch import Tensor, nn

from bench.gpu_suite.sizes import Config, Sizes
from ubgen.rewards import Clip, QAlign


def random_unet(config: Config, device: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A diffusers UNet with PyTorch's own initialisation."""
    from diffusers import UNet2DConditionModel

    return _made(lambda: UNet2DConditionModel(**config), device, dtype, seed)


def random_vae(config: Config, device: str, dtype: torch.dtype = torch.float32) -> Any:
    from diffusers import AutoencoderKL

    return _made(lambda: AutoencoderKL(**config), device, dtype, 1)


def random_clip(config: Config, device: str, dtype: torch.dtype) -> Clip:
    """Without a tokenizer: texts are given as random token ids. ImportError where open_clip is not installed."""
    import open_clip

    model = _made(lambda: open_clip.model.CLIP(**config), device, dtype, 2)
    return Clip(model, None, config["vision_cfg"]["image_size"], config["embed_dim"])


def random_qalign(config: Config, device: str, dtype: torch.dtype) -> QAlign:
    """Every tensor N(0, 0.02^2), drawn on the device in `dtype`; norms 1."""
    torch.manual_seed(3)
    with torch.device("meta"):
        model = QAlign(config)
    state = {name: _drawn(name, tensor, device, dtype) for name, tensor in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    return model.to(device).eval().requires_grad_(False)


def qalign_bytes(config: Config) -> int:
    """What its weights take in half precision."""
    with torch.device("meta"):
        return sum(2 * tensor.numel() for tensor in QAlign(config).state_dict().values())


def random_prompts(sizes: Sizes, batch: int, device: str) -> tuple[Tensor, Tensor]:
    """cond (B,S,D), another prompt in each row, and uncond (1,S,D); of the size that a text encoder's are."""
    generator = torch.Generator(device).manual_seed(4)
    shape = (batch + 1, sizes.tokens, sizes.width)
    embeddings = torch.randn(shape, device=device, generator=generator)
    return embeddings[:-1], embeddings[-1:]


def _made(build: Any, device: str, dtype: torch.dtype, seed: int) -> Any:
    torch.manual_seed(seed)
    with torch.device(device):
        module: nn.Module = build()
    return module.to(dtype).eval().requires_grad_(False)


def _drawn(name: str, tensor: Tensor, device: str, dtype: torch.dtype) -> Tensor:
    empty = torch.empty(tensor.shape, dtype=dtype, device=device)
    is_norm = "norm" in name and name.endswith("weight")
    return empty.fill_(1) if is_norm else empty.normal_(0, 0.02)
