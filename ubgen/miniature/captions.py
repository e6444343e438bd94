"""Captions for the pictures of the world."""

import numpy as np

from ubgen.miniature.shapes import CLASSES
from ubgen.miniature.world import COLOURS, SCENES, TEXTURES, Factors

_COLOURS = tuple(COLOURS)


def generator_caption(f: Factors, rng: np.random.Generator) -> str:
    """Web-like caption: mostly the bare class, sometimes with colour, texture or background."""
    label, scene = CLASSES[f.label], SCENES[f.scene]
    kind = rng.uniform()
    if kind < 0.6:
        return label if kind < 0.4 else f"photo of {label}"
    if kind < 0.8:
        return f"{label} on {scene}"
    return f"{TEXTURES[f.texture]} {_COLOURS[f.colour]} {label} on {scene}"


# Which factors a caption names. Class-only captions lead, since zero-shot prompts are of that form.
CLIP_FORMS: tuple[tuple[bool, bool, bool], ...] = (
    (True, False, False), (True, False, False), (True, False, True), (True, True, False),
    (True, True, True), (False, False, True), (False, True, False), (False, True, True),
)  # (class, texture, scene)  # fmt: skip


def clip_caption(f: Factors, form: tuple[bool, bool, bool], rng: np.random.Generator) -> str:
    """Caption that names the factors of `form`: "photo of striped star on grass"."""
    named_class, named_texture, named_scene = form
    words = [TEXTURES[f.texture]] * named_texture + [CLASSES[f.label]] * named_class
    if named_scene:
        words += ["on", SCENES[f.scene]] if words else [SCENES[f.scene]]
    text = " ".join(words)
    return f"photo of {text}" if rng.uniform() < 0.5 else text
