"""--help answers at once: no command imports a heavy library for it."""

import subprocess
import sys

import pytest

HEAVY = {
    "torch",
    "diffusers",
    "transformers",
    "onnx",
    "onnxruntime",
    "jinja2",
    "matplotlib",
    "ray",
    "open_clip",
    "peft",
    "timm",
    "torchvision",
}
PROGRAM = """
import importlib, sys
sys.argv = [f"ubgen-{sys.argv[1]}", "--help"]
try:
    importlib.import_module(f"ubgen.cli.{sys.argv[0].removeprefix('ubgen-')}").main()
finally:
    print("imported:", *sorted({name.partition(".")[0] for name in sys.modules}), file=sys.stderr)
"""


@pytest.mark.parametrize(
    "command", ["bench", "dataset", "doctor", "eval", "export", "pretrain", "report", "synth", "train"]
)
def test_help_imports_nothing_heavy(command: str) -> None:
    answer = subprocess.run(
        [sys.executable, "-c", PROGRAM, command], capture_output=True, text=True, check=False
    )
    assert answer.returncode == 0, answer.stderr
    assert f"usage: ubgen-{command}" in answer.stdout
    imported = set(answer.stderr.splitlines()[-1].split()[1:])
    assert "ubgen" in imported
    assert not HEAVY & imported
