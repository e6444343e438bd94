from pathlib import Path

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0

from ubgen.core import probes
from ubgen.core.errors import UserError
from ubgen.diffusion import load_stable_diffusion
from ubgen.train.state import set_attention

MODEL = Path(__file__).parents[2] / "golden" / "reference" / "model"
CPU = torch.device("cpu")


def test_sdpa_is_installed_where_xformers_cannot_run_and_the_log_says_why() -> None:
    unet = load_stable_diffusion(MODEL).unet
    unet.set_default_attn_processor()  # the eager one
    line = set_attention(unet, "auto", CPU, "no")
    assert line.startswith("attention: PyTorch's SDPA (xformers: ")
    assert {type(processor) for processor in unet.attn_processors.values()} == {AttnProcessor2_0}
    assert probes.xformers_problem("cpu", "float32") in line
    assert "not asked for" in set_attention(unet, "sdpa", CPU, "no")


def test_demanding_xformers_on_the_cpu_is_an_error() -> None:
    with pytest.raises(UserError, match=r"xformers cannot be used: .*use auto or sdpa"):
        set_attention(load_stable_diffusion(MODEL).unet, "xformers", CPU, "no")
