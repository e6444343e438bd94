"""What `ubgen-doctor` looks at in directories of weights: layout and sizes, then whether the networks do their work.

The pictures are a photograph that comes with matplotlib, and plain colours. A random network, or one of another model,
fails on them by far; what a check accepts says nothing about how good a network is.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.functional import center_crop, gaussian_blur, to_tensor

from ubgen.core.config import require_directory
from ubgen.core.errors import UserError, Warned
from ubgen.core.weights import TensorInfo, read_header, weight_files
from ubgen.diffusion import StableDiffusion, check_stable_diffusion, encode_prompts, load_stable_diffusion
from ubgen.diffusion.stable_diffusion import weight_file
from ubgen.rewards import Clip, QAlign
from ubgen.rewards.clip_files import find_clip
from ubgen.rewards.qalign_weights import check_weight_files, read_config

COLOURS = {
    "red": (1.0, 0.0, 0.0), "green": (0.0, 0.6, 0.0), "blue": (0.0, 0.0, 1.0), "yellow": (1.0, 1.0, 0.0),
    "orange": (1.0, 0.55, 0.0), "purple": (0.5, 0.0, 0.6), "white": (1.0, 1.0, 1.0), "black": (0.0, 0.0, 0.0),
}  # fmt: skip
OPENAI_VOCABULARY = 49408
_LARGE = 8e9  # bytes of weights; on a CPU they are computed in bfloat16


@dataclass(frozen=True)
class Check:
    """One line of the doctor: `detail` says what was seen, or what is wrong and what would be right."""

    name: str
    ok: bool
    detail: str


def check_weights(
    stable_diffusion: str | None, clip: str | None, qalign: str | None, device: str
) -> Iterator[Check]:
    """The checks of the directories that are given, one family in memory at a time, each as soon as it is done."""
    families: list[tuple[str | None, Callable[[str, str], Iterator[Check]]]] = [
        (stable_diffusion, _check_stable_diffusion),
        (clip, _check_clip),
        (qalign, _check_qalign),
    ]
    for path, check in families:
        if path is not None:
            yield from check(path, device)


class _Checks:
    """Collects the checks of one family; a failed one ends those that need its result."""

    def __init__(self, family: str) -> None:
        self.family, self.done = family, list[Check]()

    @contextmanager
    def check(self, name: str) -> Iterator[list[str]]:
        """Put the line for success into the list; a UserError or a warning for the user is a failure."""
        said: list[str] = []
        title = f"{self.family}: {name}"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", Warned)
                yield said
        except (UserError, Warned) as error:
            self.done.append(Check(title, False, str(error)))
        else:
            self.done.append(Check(title, True, said[0]))

    @property
    def fine(self) -> bool:
        return all(check.ok for check in self.done)


# --- Stable Diffusion ---


def _check_stable_diffusion(path: str, device: str) -> Iterator[Check]:
    checks = _Checks("Stable Diffusion")
    with checks.check("files") as say:
        root = _stable_diffusion_directory(path)
        parts = ("unet", "vae", "text_encoder")
        say.append("; ".join(f"{part} {_size(read_header(weight_file(root / part)[0]))}" for part in parts))
    yield checks.done[-1]
    if not checks.fine:
        return
    with checks.check("weights") as say:
        dtype = torch.float32 if device == "cpu" else torch.float16
        sd = load_stable_diffusion(path, dtype, device)
        say.append(f"finite, and all of their network; {sd.latent_shape()} latents")
    yield checks.done[-1]
    if not checks.fine:
        return
    for name, run in (("VAE", _vae), ("tokenizer", _tokenizer), ("UNet on the VAE's latents", _denoise)):
        with checks.check(name) as say:
            say.append(run(sd))
        yield checks.done[-1]
        if run is _tokenizer and not checks.done[-1].ok:
            return  # the UNet needs a prompt


def _stable_diffusion_directory(path: str) -> Path:
    """UserError with the command that makes a directory of a single-file checkpoint."""
    given = Path(path).expanduser()
    single = [given] if given.is_file() else sorted(given.glob("*.safetensors")) if given.is_dir() else []
    if single and not (given / "unet").is_dir():
        raise UserError(
            f"{single[0]} is a single-file checkpoint; make a diffusers directory of it once (diffusers may download "
            'its configs): python -c "from diffusers import StableDiffusionPipeline as P; '
            f"P.from_single_file('{single[0]}').save_pretrained('{single[0].with_suffix('')}')\""
        )
    return check_stable_diffusion(path)


def _tokenizer(sd: StableDiffusion) -> str:
    if sd.tokenizer is None:
        raise UserError(
            f"{sd.path / 'tokenizer'} is missing; copy it from the model that the weights come from"
        )
    size, known = len(sd.tokenizer), sd.text_encoder.config.vocab_size
    if size > known:
        raise UserError(f"it has {size} tokens, the text encoder knows {known}; take both from one model")
    cat, dog = encode_prompts(sd, ["cat", "dog"]).float()
    if torch.allclose(cat, dog, atol=1e-3):
        raise UserError(
            "the text encoder gives 'cat' and 'dog' the same embedding; its weights cannot be right"
        )
    return f"{size} tokens, up to {sd.text_encoder.config.max_position_embeddings} in a prompt"


@torch.no_grad()
def _vae(sd: StableDiffusion) -> str:
    """A photograph through encoder and decoder, and the size of its latents: 1 is what `scaling_factor` is for."""
    image = _photo(_image_size(sd)).to(sd.vae.device, sd.vae.dtype)
    latents = _latents(sd, image)
    if latents.shape[1:] != sd.latent_shape():
        raise UserError(
            f"its latents are {tuple(latents.shape[1:])}, the UNet's sample_size needs {sd.latent_shape()}"
        )
    decoded = sd.vae.decode(latents / sd.vae.config.scaling_factor).sample / 2 + 0.5
    lost = float((decoded - image).float().square().mean() / image.float().var())
    if not lost < 0.5:
        raise UserError(
            f"a photograph comes out with {lost:.0%} of its variance lost; encoder and decoder do not fit"
        )
    scale, factor = float(latents.float().std()), sd.vae.config.scaling_factor
    if not 0.3 < scale < 3:
        raise UserError(
            f"the latents of a photograph have the standard deviation {scale:.2f} instead of about 1; "
            f"set scaling_factor in {sd.path / 'vae' / 'config.json'} to about {factor / scale:.2g}, not {factor:.2g}"
        )
    return f"keeps {1 - lost:.0%} of a photograph's variance; latents' standard deviation {scale:.2f}"


@torch.no_grad()
def _denoise(sd: StableDiffusion) -> str:
    """The UNet's error on a noisy photograph half way through the schedule; predicting zeros has the error 1."""
    from diffusers import DDPMScheduler

    noise_levels = DDPMScheduler.from_config(sd.scheduler.config).alphas_cumprod
    step = len(noise_levels) // 2
    signal, sigma = float(noise_levels[step]) ** 0.5, float(1 - noise_levels[step]) ** 0.5
    x = _latents(sd, _photo(_image_size(sd)).to(sd.vae.device, sd.vae.dtype))
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x)
    predicted = sd.unet(signal * x + sigma * noise, step, encode_prompts(sd, [""])).sample
    kind = sd.scheduler.config.get("prediction_type", "epsilon")
    target = {"epsilon": noise, "sample": x, "v_prediction": signal * noise - sigma * x}[kind]
    error = float((predicted - target).float().square().mean() / target.float().square().mean())
    if not error < 0.5:
        raise UserError(
            f"its error on a noisy photograph is {error:.2f}, no better than guessing (1): VAE and UNet are not of one "
            "model, or the scheduler's prediction_type is wrong"
        )
    return f"removes {1 - error:.0%} of the noise of a photograph at step {step}"


def _image_size(sd: StableDiffusion) -> int:
    return sd.latent_shape()[1] * 2 ** (len(sd.vae.config.block_out_channels) - 1)


def _latents(sd: StableDiffusion, image_1CHW: Tensor) -> Tensor:
    return sd.vae.encode(image_1CHW * 2 - 1).latent_dist.mean * sd.vae.config.scaling_factor


# --- CLIP ---


def _check_clip(path: str, device: str) -> Iterator[Check]:
    checks = _Checks("CLIP")
    with checks.check("files") as say:
        files = find_clip(path)
        layout = "transformers" if files.is_transformers else "open_clip"
        config = files.model_cfg
        activation = "quick-GELU" if config.get("quick_gelu") else "GELU"
        sizes = f"{config['vision_cfg']['image_size']} px, {config['embed_dim']} features, {activation}"
        say.append(f"{layout}'s layout, {_size(_headers(files.weights))}, {sizes}")
    yield checks.done[-1]
    if not checks.fine:
        return
    with checks.check("weights") as say:
        clip = Clip.load(path, device=device)
        say.append("finite, and those of the config")
    yield checks.done[-1]
    if not checks.fine:
        return
    with checks.check("what it sees") as say:
        say.append(_zero_shot(clip, files.model_cfg["text_cfg"].get("vocab_size", OPENAI_VOCABULARY)))
    yield checks.done[-1]


@torch.no_grad()
def _zero_shot(clip: Clip, vocabulary: int) -> str:
    """Eight pictures against eight texts; where one is right by chance in eight, six are by chance in 10,000."""
    what, pictures, texts = _colours() if vocabulary == OPENAI_VOCABULARY else _scenes()
    images = F.normalize(clip.encode_image(pictures.to(clip.device)).float(), dim=1)
    words = F.normalize(clip.encode_text(texts).float(), dim=1)
    right = int(((images @ words.T).argmax(1).cpu() == torch.arange(len(texts))).sum())
    if right < 6:
        raise UserError(
            f"it tells {right} of {len(texts)} {what} apart: its two towers do not fit, or the tokenizer is another"
        )
    return f"tells {right} of {len(texts)} {what} apart"


def _colours() -> tuple[str, Tensor, list[str]]:
    pictures = torch.tensor(list(COLOURS.values()))[:, :, None, None].expand(-1, -1, 224, 224)
    return "plain colours", pictures, [f"a photo of the color {name}" for name in COLOURS]


def _scenes() -> tuple[str, Tensor, list[str]]:
    """For a vocabulary of its own, the miniature's: it knows the backgrounds of its world and no colours."""
    from dataclasses import replace

    from ubgen.miniature.world import SCENES, fair_world, render, stream

    world, pictures, texts = fair_world(), [], []
    for scene, name in enumerate(SCENES):
        rng = stream(0, "doctor", scene)
        pictures.append(torch.tensor(render(replace(world.draw(rng), scene=scene), rng)))
        texts.append(f"photo of {name}")
    return "backgrounds of the miniature", torch.stack(pictures).permute(0, 3, 1, 2) / 255, texts


# --- Q-Align ---


def _check_qalign(path: str, device: str) -> Iterator[Check]:
    checks = _Checks("Q-Align")
    with checks.check("files") as say:
        directory = require_directory(path, "--qalign")
        config = read_config(directory)
        with torch.device("meta"):
            network = QAlign(config)
        check_weight_files(directory, {name: t.shape for name, t in network.state_dict().items()})
        files = weight_files(directory, "Q-Align")
        size = sum(file.stat().st_size for file in files)
        say.append(
            f"{len(files)} file(s), {size / 1e6:.0f} MB, {network.sizes.num_hidden_layers} decoder layers"
        )
    yield checks.done[-1]
    if not checks.fine:
        return
    with checks.check("weights") as say:
        dtype = torch.float16 if device != "cpu" else torch.bfloat16 if size > _LARGE else torch.float32
        qalign = QAlign.load(path, dtype, device)
        say.append("finite, and those of the config")
    yield checks.done[-1]
    if not checks.fine:
        return
    with checks.check("what it prefers") as say:
        say.append(_blur(qalign))
    yield checks.done[-1]


@torch.no_grad()
def _blur(qalign: QAlign) -> str:
    """A photograph, and two blurred copies, by Gaussians of 1/128 and 1/32 of its side."""
    sharp = _photo(512)
    copies = [sharp, gaussian_blur(sharp, 25, 4.0), gaussian_blur(sharp, 97, 16.0)]
    device = qalign.lm_head.weight.device
    scores = [float(qalign.score(image.to(device))) for image in copies]
    shown = f"a photograph {scores[0]:.2f}, blurred {scores[1]:.2f}, more so {scores[2]:.2f} (1 to 5)"
    if not (scores[0] > scores[1] > scores[2] and scores[0] - scores[2] > 0.5):
        raise UserError(f"it does not rank by quality: {shown}; these are not the weights of one-align")
    return shown


# --- shared ---


def _photo(size: int) -> Tensor:
    """(1, 3, size, size) in [0, 1]: the portrait that matplotlib brings along."""
    from matplotlib.cbook import get_sample_data
    from PIL import Image

    try:
        file = get_sample_data("grace_hopper.jpg", asfileobj=False)
        picture = to_tensor(Image.open(str(file)).convert("RGB"))
    except FileNotFoundError:
        raise UserError(
            "matplotlib lacks its sample pictures, which these checks use; pip install --force-reinstall matplotlib"
        ) from None
    square = center_crop(picture, [512, 512])[None]
    if size == 512:
        return square
    return F.interpolate(square, size=(size, size), mode="bicubic", antialias=True).clamp(0, 1)


def _headers(files: Sequence[Path]) -> dict[str, TensorInfo]:
    """Of the safetensors among them; a pickle has none."""
    return {
        name: t for file in files if file.suffix == ".safetensors" for name, t in read_header(file).items()
    }


def _size(tensors: dict[str, TensorInfo]) -> str:
    if not tensors:
        return "pickled weights"
    count = sum(math.prod(info.shape) for info in tensors.values())
    return f"{count / 1e6:.1f} M values in {' and '.join(sorted({info.dtype for info in tensors.values()}))}"
