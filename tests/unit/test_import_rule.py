"""The import rule: kept by the package, and broken by each kind of import that it forbids."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LINT = "import sys; from importlinter.cli import lint_imports_command; lint_imports_command(['--no-cache'])"


def lint(directory):
    """Without site's start-up, so that an editable install does not lead to another copy of the package."""
    path = os.pathsep.join([str(directory), sysconfig.get_path("purelib")])
    return subprocess.run(
        [sys.executable, "-S", "-c", LINT],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def checkout(tmp_path):
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    only_python = shutil.ignore_patterns("weights", "__pycache__", "data")
    shutil.copytree(ROOT / "ubgen", tmp_path / "ubgen", ignore=only_python)
    return tmp_path


def test_the_package_keeps_the_rule(checkout):
    answer = lint(checkout)
    assert answer.returncode == 0, answer.stdout


@pytest.mark.parametrize(
    ("file", "line", "broken"),
    [
        ("ops/bad.py", "import ubgen.diffusion", "imports point one way"),
        ("rewards/bad.py", "from ubgen.miniature import world", "imports point one way"),
        ("export/exportable.py", "import ubgen.export.networks", "inside export"),
        ("rewards/bad.py", "import tensorrt", "know a compiler"),
        ("cli/bad.py", "import onnxruntime", "know a compiler"),
        ("diffusion/bad.py", "import xformers.ops", "without the optional packages"),
    ],
)
def test_a_forbidden_import_is_found(checkout, file, line, broken):
    (checkout / "ubgen" / file).write_text(f"{line}\n")
    answer = lint(checkout)
    assert answer.returncode == 1
    assert any(broken in text and "BROKEN" in text for text in answer.stdout.splitlines())
