"""xformers is used only where it has computed the UNet's attention; packages in its place show what is noticed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

START = """
import torch
from torch.nn.functional import scaled_dot_product_attention


def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None, op=None):
"""
WORKS = "return scaled_dot_product_attention(query, key, value, scale=scale)"
NARROW = f"""if query.shape[-1] > 128:
        raise NotImplementedError("No operator found for this attention:\\n a page of reasons")
    {WORKS}"""
NO_BACKWARD = """class Attention(torch.autograd.Function):
        @staticmethod
        def forward(context, *given):
            return scaled_dot_product_attention(*given)

        @staticmethod
        def backward(context, gradient):
            raise RuntimeError("no backward kernel")

    return Attention.apply(query, key, value)"""
WRONG = "return scaled_dot_product_attention(query, key, value, scale=1.0)"


def problem(directory: Path, body: str) -> str:
    """What the probe says of an xformers whose operator has this body."""
    (directory / "xformers").mkdir()
    (directory / "xformers" / "__init__.py").write_text("__version__ = '0.0.35'\n")
    (directory / "xformers" / "ops.py").write_text(f"{START}    {body}\n")
    code = "from ubgen.core.probes import xformers_problem; print(xformers_problem('cpu', 'bfloat16'))"
    environment = {**os.environ, "PYTHONPATH": str(directory)}
    answer = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    return answer.stdout.strip()


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (WORKS, ""),
        (NARROW, "0.0.35 fails at head width 160 in bfloat16 on cpu: NotImplementedError: No operator found"),
        (NO_BACKWARD, "fails at head width 40 in bfloat16 on cpu: RuntimeError: no backward kernel"),
        (WRONG, "fails at head width 40 in bfloat16 on cpu: its results differ from PyTorch's"),
    ],
    ids=["works", "narrow", "no backward", "wrong"],
)
def test_xformers_is_tried_forward_and_backward(tmp_path: Path, body: str, expected: str) -> None:
    found = problem(tmp_path, body)
    assert found == "" if expected == "" else expected in found
    assert "\n" not in found
