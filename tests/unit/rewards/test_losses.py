from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from ubgen.core.errors import UserError
from ubgen.rewards import (
    Discriminator,
    LossWeights,
    discriminator_loss,
    draw_negatives,
    entire_alignment_loss,
    generator_loss,
    individual_alignment_loss,
    quality_loss,
)

GOLDEN = Path(__file__).parents[2] / "golden/reference/losses.safetensors"
KINDS = {"leaky": "leaky_relu", "relu": "relu"}


@pytest.fixture(scope="module")
def gold() -> dict[str, Tensor]:
    return load_file(GOLDEN)


def golden_discriminator(gold: dict[str, Tensor], kind: str) -> Discriminator:
    discriminator = Discriminator(16, activation=KINDS[kind])
    weights = {key.removeprefix("D."): value for key, value in gold.items() if key.startswith("D.")}
    discriminator.load_state_dict(weights)
    return discriminator


def close(value: Tensor, expected: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(value.detach().reshape(expected.shape), expected, rtol=0, atol=atol)


def images_and_texts(gold: dict[str, Tensor], drawn: str) -> tuple[Tensor, Tensor]:
    images = gold["image_features"].clone().requires_grad_()
    return images, gold["class_text_features"][gold[drawn]].clone().requires_grad_()


@pytest.mark.parametrize("kind", KINDS)
def test_logits(gold, kind):
    discriminator = golden_discriminator(gold, kind)
    close(discriminator(gold["image_features"]), gold[f"{kind}.logits_image"])
    close(discriminator(gold["class_text_features"]), gold[f"{kind}.logits_class_text"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("drawn", ["paper", "ref"])
def test_discriminator_loss_and_its_gradients(gold, kind, drawn):
    discriminator = golden_discriminator(gold, kind)
    images, texts = images_and_texts(gold, f"{drawn}_text_idx")
    loss = discriminator_loss(discriminator, images, texts)
    loss.backward()
    key = f"{kind}.d_loss_{drawn}"
    close(loss, gold[key])
    close(images.grad, gold[f"{key}.grad_image_features"])
    close(texts.grad, gold[f"{key}.grad_chosen_text_features"])
    for name, parameter in discriminator.named_parameters():
        close(parameter.grad, gold[f"{key}.grad_D.{name}"])


@pytest.mark.parametrize("kind", KINDS)
def test_generator_loss_of_the_released_code(gold, kind):
    discriminator = golden_discriminator(gold, kind)
    images, _ = images_and_texts(gold, "paper_text_idx")
    loss = entire_alignment_loss(discriminator, images)
    loss.backward()
    close(loss, gold[f"{kind}.g_loss"])
    close(loss, gold[f"{kind}.released_total"])
    close(images.grad, gold[f"{kind}.g_loss.grad_image_features"])
    for name, parameter in discriminator.named_parameters():
        close(parameter.grad, gold[f"{kind}.g_loss.grad_D.{name}"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("positive", ["image", "text"])
def test_eq5_read_literally(gold, kind, positive):
    """The data has Eq. 5 for both labellings; the other one is ours with the logit negated."""
    inner = golden_discriminator(gold, kind)
    discriminator = inner if positive == "image" else lambda features: -inner(features)
    images, texts = images_and_texts(gold, "paper_text_idx")
    key = f"{kind}.eq5.{positive}_is_positive"
    for row in range(4):
        pair = images[row : row + 1], texts[row : row + 1]
        close(entire_alignment_loss(discriminator, *pair, gan_loss="saturating"), gold[key][row])
    loss = entire_alignment_loss(discriminator, images, texts, gan_loss="saturating")
    (grad,) = torch.autograd.grad(loss, images)
    close(grad, gold[f"{key}.grad_image_features"])


def test_individual_alignment(gold):
    images = gold["image_features"].clone().requires_grad_()
    texts = gold["prompt_text_features"][gold["class_idx"]]
    for pairs in ("matching", "matrix"):
        loss = individual_alignment_loss(images, texts, pairs)
        (grad,) = torch.autograd.grad(loss, images)
        close(loss, gold[f"individual_{pairs}"])
        close(grad, gold[f"individual_{pairs}.grad_image_features"])
    for row in range(4):
        pair = images[row : row + 1], texts[row : row + 1]
        close(individual_alignment_loss(*pair), gold["individual_matching_per_image"][row])
        others = images[row : row + 1].expand(4, -1), texts
        close(1 - individual_alignment_loss(*others), gold["cosine_matrix"][row].mean())


@pytest.mark.parametrize("weight", [1.0, 0.1])
def test_quality(gold, weight):
    scores = gold["scores"].clone().requires_grad_()
    loss = generator_loss({"quality": quality_loss(scores)}, LossWeights(quality=weight))
    loss.backward()
    close(loss, gold[f"quality_w{weight}"])
    close(scores.grad, gold[f"quality_w{weight}.grad_scores"])


@pytest.mark.parametrize("kind", KINDS)
def test_eq8(gold, kind):
    discriminator = golden_discriminator(gold, kind)
    images, _ = images_and_texts(gold, "paper_text_idx")
    scores = gold["scores"].clone().requires_grad_()
    terms = {
        "entire": entire_alignment_loss(discriminator, images),
        "individual": individual_alignment_loss(images, gold["prompt_text_features"][gold["class_idx"]]),
        "quality": quality_loss(scores),
    }
    loss = generator_loss(terms)
    loss.backward()
    close(loss, gold[f"{kind}.eq8_total"])
    close(images.grad, gold[f"{kind}.eq8_total.grad_image_features"])
    close(scores.grad, gold[f"{kind}.eq8_total.grad_scores"])
    close(generator_loss({"entire": terms["entire"]}), gold[f"{kind}.g_loss"])


def test_three_updates_of_the_discriminator(gold):
    discriminator = golden_discriminator(gold, "leaky")
    optimiser = torch.optim.AdamW(
        discriminator.parameters(), lr=1e-5, betas=(0.0, 0.999), weight_decay=0.01, eps=1e-8
    )
    texts = gold["class_text_features"][gold["ref_text_idx"]]
    for _ in range(3):
        optimiser.zero_grad()
        discriminator_loss(discriminator, gold["image_features"], texts).backward()
        torch.nn.utils.clip_grad_norm_(discriminator.parameters(), 1.0)
        optimiser.step()
    for name, parameter in discriminator.named_parameters():
        close(parameter, gold[f"D_after_3_updates.{name}"], atol=5e-7)


def test_the_two_generator_losses_pull_the_same_way(gold):
    discriminator = golden_discriminator(gold, "leaky")
    images, texts = images_and_texts(gold, "paper_text_idx")
    (one,) = torch.autograd.grad(entire_alignment_loss(discriminator, images), images)
    literal = entire_alignment_loss(discriminator, images, texts, gan_loss="saturating")
    (other,) = torch.autograd.grad(literal, images)
    assert (torch.cosine_similarity(one, other) > 0.999).all()


def test_discriminator_has_three_hidden_units_unless_told():
    assert sum(p.numel() for p in Discriminator(16).parameters()) == 16 * 3 + 3 + 3 + 1
    assert sum(p.numel() for p in Discriminator(16, hidden=8).parameters()) == 16 * 8 + 8 + 8 + 1


def test_normalised_features_hide_their_length():
    discriminator = Discriminator(16, features="normalised")
    features = torch.randn(5, 16)
    torch.testing.assert_close(discriminator(features), discriminator(features * 7))


def test_discriminator_stays_in_float32_under_autocast():
    discriminator, features = Discriminator(16), torch.randn(5, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(discriminator(features), discriminator(features.float()))
        assert discriminator(features.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("wrong", [{"activation": "gelu"}, {"features": "l2"}])
def test_unknown_discriminator_options(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Discriminator(16, **wrong)


def test_wrong_use_of_the_losses(gold):
    discriminator = golden_discriminator(gold, "relu")
    with pytest.raises(ValueError, match="text_features"):
        entire_alignment_loss(discriminator, gold["image_features"], gan_loss="saturating")
    with pytest.raises(ValueError, match="gan_loss"):
        entire_alignment_loss(discriminator, gold["image_features"], gan_loss="hinge")
    with pytest.raises(ValueError, match="nothing to train"):
        generator_loss({})


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.sampled_from(["crane", "Crane", "crane  ", "maillot", "sun  hat", "sun hat", "cat"]), min_size=2
    ),
    st.integers(0, 2**31),
    st.data(),
)
def test_a_negative_never_shares_the_name(names, seed, data):
    def key(index: int) -> str:
        return " ".join(names[index].lower().split())

    classes = torch.tensor(data.draw(st.lists(st.integers(0, len(names) - 1), min_size=1, max_size=8)))
    generator = torch.Generator().manual_seed(seed)
    if len({key(i) for i in range(len(names))}) == 1:
        with pytest.raises(UserError, match="at least two"):
            draw_negatives(classes, names, generator)
        return
    drawn = draw_negatives(classes, names, generator)
    assert drawn.shape == classes.shape
    assert all(key(int(own)) != key(int(other)) for own, other in zip(classes, drawn, strict=True))


def test_negatives_are_uniform_over_the_other_classes_and_seeded():
    names = ["crane", "cat", "crane", "dog", "hat"]
    classes = torch.zeros(30_000, dtype=torch.long)
    drawn = draw_negatives(classes, names, torch.Generator().manual_seed(3))
    counts = torch.bincount(drawn, minlength=5)
    assert counts[0] == counts[2] == 0
    assert (counts[[1, 3, 4]] - 10_000).abs().max() < 400  # five standard deviations
    assert torch.equal(drawn, draw_negatives(classes, names, torch.Generator().manual_seed(3)))
