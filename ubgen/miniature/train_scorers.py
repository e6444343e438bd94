"""Training of the networks that judge pictures: the oracle, CLIP and Q-Align."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTokenizer

from ubgen.miniature import networks, quality
from ubgen.miniature.captions import CLIP_FORMS, clip_caption
from ubgen.miniature.train_generator import Budget, encode_images
from ubgen.miniature.training import fit, seed_all
from ubgen.miniature.world import Factors, World, fair_world, render_many
from ubgen.rewards import QAlign, qalign_preprocess

# Scorers see web-like softness too, so that they judge what the generator makes and not only clean pictures.
_MIXED: dict[str, Any] = {"severity_range": (0.0, 0.5)}


def to_unit(images_BHW3: np.ndarray) -> Tensor:
    """uint8 (B, 64, 64, 3) -> float (B, 3, 64, 64) in [0, 1]."""
    return torch.from_numpy(images_BHW3).permute(0, 3, 1, 2).float() / 255


def shift(images_B3HW: Tensor, generator: torch.Generator) -> Tensor:
    """Augmentation: the whole batch moved by up to 3 pixels."""
    dy, dx = torch.randint(-3, 4, (2,), generator=generator).tolist()
    return torch.roll(images_B3HW, (dy, dx), dims=(2, 3))


def train_oracle(work: Path, vae: AutoencoderKL, budget: Budget, seed: int) -> networks.Oracle:
    """Judge of class, background and texture, on the fair world alone.

    Every second picture has been through the autoencoder: the oracle judges what a decoder paints, and one that
    knows rendered edges only takes half of the reconstructed stars for something else.
    """
    seed_all(seed)
    oracle = networks.Oracle()
    for cycle, lr in ((0, 2e-3), (1, 1.5e-3)):  # the second cycle sees new pictures
        _oracle_cycle(work / f"oracle-{cycle}.pt", oracle, vae, budget, seed + 100 * cycle, lr)
    return oracle.eval()


def _oracle_cycle(
    checkpoint: Path, oracle: networks.Oracle, vae: AutoencoderKL, budget: Budget, seed: int, lr: float
) -> None:
    images, factors = render_many(fair_world(**_MIXED), budget.scorer_images, seed + 1)
    images[::2] = reconstruct(vae, images[::2])
    targets = {
        name: torch.tensor([getattr(f, name) for f in factors]) for name in ("label", "scene", "texture")
    }

    def loss(generator: torch.Generator) -> Tensor:
        pick = torch.randint(0, len(images), (128,), generator=generator)
        logits = oracle(shift(to_unit(images[pick.numpy()]), generator))
        return torch.stack([F.cross_entropy(logits[k], target[pick]) for k, target in targets.items()]).sum()

    title = checkpoint.stem
    fit(
        title, oracle, loss, steps=budget.oracle_steps, lr=lr, seed=seed, checkpoint=checkpoint, average=0.995
    )


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, images_BHW3: np.ndarray) -> np.ndarray:
    """uint8 pictures through encoder and decoder."""
    decoded = torch.cat([vae.decode(z).sample for z in encode_images(vae, images_BHW3).split(64)])
    return ((decoded / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def clip_config(tokenizer: CLIPTokenizer) -> dict:
    config = json.loads(json.dumps(networks.CLIP_CONFIG))
    config["model_cfg"]["text_cfg"] |= {"vocab_size": len(tokenizer), "hf_tokenizer_name": "."}
    return config


def true_pairs(factors: list[Factors], form_of_text: list[tuple[bool, bool, bool]]) -> Tensor:
    """(images, texts) booleans: whether text j, made from image j, is also true of image i."""
    code = torch.tensor([[f.label, f.texture, f.scene] for f in factors])
    named = torch.tensor(form_of_text)
    same = code[:, None, :] == code[None, :, :]
    return (same | ~named[None, :, :]).all(dim=-1)


def contrastive_loss(logits: Tensor, positive: Tensor) -> Tensor:
    """CLIP's two cross-entropies where every true pair of the batch counts as a positive."""
    target = positive.float()
    by_image = -(F.log_softmax(logits, dim=1) * target / target.sum(1, keepdim=True)).sum(1).mean()
    by_text = -(F.log_softmax(logits, dim=0) * target / target.sum(0, keepdim=True)).sum(0).mean()
    return (by_image + by_text) / 2


def train_clip(work: Path, directory: Path, budget: Budget, seed: int) -> None:
    """CLIP on the fair world; written to `directory` as open_clip's config, weights and tokenizer.

    A linear head on the image features, thrown away afterwards, names the factors beside the contrastive loss:
    backgrounds separate within a hundred steps, and alone they would hold the shapes back for thousands.
    """
    seed_all(seed)
    tokenizer = networks.tokenizer(directory)
    config = clip_config(tokenizer)
    (directory / "open_clip_config.json").write_text(json.dumps(config, indent=2))
    tokenise = open_clip.get_tokenizer(f"local-dir:{directory}")
    images, factors = render_many(fair_world(**_MIXED), budget.scorer_images, seed + 1)
    targets = {
        name: torch.tensor([getattr(f, name) for f in factors]) for name in ("label", "scene", "texture")
    }
    architecture = {**config["model_cfg"], "text_cfg": dict(config["model_cfg"]["text_cfg"])}
    architecture["text_cfg"].pop("hf_tokenizer_name")
    model = open_clip.model.CLIP(**architecture)
    helper = nn.ModuleDict(
        {name: nn.Linear(architecture["embed_dim"], int(t.max()) + 1) for name, t in targets.items()}
    )
    mean = torch.tensor(config["preprocess_cfg"]["mean"])[:, None, None]
    std = torch.tensor(config["preprocess_cfg"]["std"])[:, None, None]

    def loss(generator: torch.Generator) -> Tensor:
        pick = torch.randint(0, len(images), (128,), generator=generator).tolist()
        rng = np.random.default_rng(int(torch.randint(0, 2**31, (1,), generator=generator)))
        forms = [CLIP_FORMS[i] for i in rng.integers(0, len(CLIP_FORMS), len(pick))]
        shown = [factors[i] for i in pick]
        texts = tokenise([clip_caption(f, form, rng) for f, form in zip(shown, forms, strict=True)])
        features = model.encode_image((shift(to_unit(images[pick]), generator) - mean) / std)
        image, text = F.normalize(features, dim=1), model.encode_text(texts, normalize=True)
        beside = sum(
            F.cross_entropy(helper[name](features), target[pick]) for name, target in targets.items()
        )
        pairs = contrastive_loss(
            model.logit_scale.exp().clamp(max=100) * image @ text.T, true_pairs(shown, forms)
        )
        return pairs + beside

    both = nn.ModuleList([model, helper])
    fit(
        "CLIP",
        both,
        loss,
        steps=budget.clip_steps,
        lr=2e-3,
        seed=seed,
        checkpoint=work / "clip.pt",
        average=0.998,
    )
    save_file(model.state_dict(), directory / "open_clip_model.safetensors")


def quality_world() -> World:
    """The fair world over the whole range of every degradation."""
    return fair_world(severity_range=(0.0, 1.0))


def train_qalign(work: Path, directory: Path, budget: Budget, seed: int) -> None:
    """Q-Align on the quality factor: the next word after the prompt is the level word of the degradation.

    The target is spread over the two nearest levels, so that the expected score is 5 - 4 * severity. A linear
    head on the mean of the vision tower's tokens, thrown away afterwards, learns severity and kind beside it:
    without that shortcut the gradient through abstractor and language model does not start the vision tower.
    """
    seed_all(seed)
    images, factors = render_many(quality_world(), budget.scorer_images, seed + 1)
    severity = torch.tensor([f.severity for f in factors])
    kind = torch.tensor([quality.KINDS.index(f.kind) for f in factors])
    place = severity * (len(quality.LEVELS) - 1)
    target = (1 - (place[:, None] - torch.arange(len(quality.LEVELS))).abs()).clamp(min=0)
    model = QAlign.from_config(networks.qalign_config())
    helper = nn.Linear(
        networks.qalign_config()["visual_config"]["visual_model"]["hidden_size"], 1 + len(quality.KINDS)
    )
    tower: list[Tensor] = []
    model.model.vision_model.register_forward_hook(lambda module, inputs, output: tower.append(output))

    def loss(generator: torch.Generator) -> Tensor:
        pick = torch.randint(0, len(images), (96,), generator=generator)
        tower.clear()
        logits = model.level_logits(qalign_preprocess(to_unit(images[pick.numpy()]), networks.IMAGE_SIZE))
        seen = helper(tower[0].mean(dim=1))
        beside = (seen[:, 0] - severity[pick]).square().mean() * 4 + 0.3 * F.cross_entropy(
            seen[:, 1:], kind[pick]
        )
        return F.cross_entropy(logits, target[pick]) + beside

    both = nn.ModuleList([model, helper])
    fit(
        "Q-Align",
        both,
        loss,
        steps=budget.qalign_steps,
        lr=7e-4,
        seed=seed,
        checkpoint=work / "qalign.pt",
        average=0.998,
    )
    model.save(directory)
