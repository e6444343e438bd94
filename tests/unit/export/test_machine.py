"""What a machine cannot build is known before any work."""

import os
import subprocess
import sys
from pathlib import Path

from ubgen.core.config import engine_spec_path
from ubgen.core.probes import Probe, at_least

PROGRAM = """
import sys, torch
torch.cuda.is_available = lambda: True
torch.cuda.get_device_name = lambda *device: "stand-in"
torch.cuda.get_device_capability = lambda *device: (9, 0)
from ubgen.export import load_spec, why_not
for path in sys.argv[1:]:
    print(why_not(load_spec(path)))
"""


def test_a_tensorrt_without_what_the_opset_needs_is_named(tmp_path: Path) -> None:
    """On a machine that has a GPU, as far as torch is asked, and that release."""
    shipped = engine_spec_path("sd15-fp16")
    older = tmp_path / "older.toml"
    older.write_text(
        shipped.read_text(encoding="utf-8").replace("opset = 23", "opset = 20"), encoding="utf-8"
    )
    (tmp_path / "tensorrt.py").write_text('__version__ = "10.14.1.48"\n', encoding="utf-8")
    answer = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(shipped), str(older)],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert answer.stdout.splitlines() == [
        "tensorrt: 10.14.1.48 is too old; pip install --upgrade 'tensorrt>=10.15', or set opset = 20",
        "None",
    ]


def test_a_release_is_old_enough_by_numbers() -> None:
    assert at_least(Probe("tensorrt", True, "10.15.1.29"), "tensorrt", (10, 15)).available
    assert not at_least(Probe("tensorrt", True, "10.9.0.34"), "tensorrt", (10, 15)).available
    missing = Probe("tensorrt", False, "not installed")
    assert at_least(missing, "tensorrt", (10, 15)) == missing
