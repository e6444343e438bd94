from pathlib import Path

import pytest
from safetensors.torch import load_file

from ubgen.diffusion import StableDiffusion, load_stable_diffusion

REFERENCE = Path(__file__).parents[2] / "golden" / "reference"


@pytest.fixture(scope="session")
def reference() -> Path:
    return REFERENCE


@pytest.fixture
def tiny() -> StableDiffusion:
    """The reference pipeline: random weights, 4x8x8 latents, 16x16 images."""
    return load_stable_diffusion(REFERENCE / "model")


@pytest.fixture(scope="session")
def recorded_rollout() -> dict:
    return load_file(REFERENCE / "rollout.safetensors")
