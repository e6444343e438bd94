"""Published wheels of packages that cannot be installed everywhere: fetched, opened, and held against our code."""

import ctypes
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest

from ubgen.core.files import cache_directory

_FRESH = 7 * 24 * 3600  # seconds for which the newest release is taken to be the newest

Unpack = Callable[[str], Path]
Bindings = Callable[[str], tuple[Path, dict[str, str]]]


@pytest.fixture(scope="session")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Unpack:
    """unpacked(requirement): directory with what the newest wheel holds; the test is skipped where none is found."""
    root = tmp_path_factory.mktemp("wheels")

    def unpack(requirement: str) -> Path:
        directory = root / sha256(requirement.encode()).hexdigest()[:12]
        if not directory.exists():
            with zipfile.ZipFile(_wheel(requirement)) as wheel:
                wheel.extractall(directory)
        return directory

    return unpack


@pytest.fixture(scope="session")
def bindings(unpacked: Unpack, tmp_path_factory: pytest.TempPathFactory) -> Bindings:
    """bindings(requirement): directory of TensorRT's Python bindings, and an environment in which they load."""
    for tool in ("cc", "nm", "readelf"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not on the PATH")

    def load(requirement: str) -> tuple[Path, dict[str, str]]:
        directory = unpacked(requirement)
        library = next(directory.glob("tensorrt_bindings/*.so"))
        libraries = _stand_ins(library, tmp_path_factory.mktemp("libraries"))
        return directory, {**os.environ, "LD_LIBRARY_PATH": str(libraries), "PYTHONPATH": str(directory)}

    return load


def _stand_ins(library: Path, directory: Path) -> Path:
    """Libraries of the names that `library` asks for; every function in them returns a null pointer."""
    dynamic = subprocess.run(["readelf", "-dW", library], capture_output=True, text=True, check=True).stdout
    listed = subprocess.run(["nm", "-Du", library], capture_output=True, text=True, check=True).stdout
    here = ctypes.CDLL(None)
    wanted = re.findall(r"^\s*U (\w+)$", listed, re.MULTILINE)
    source = directory / "null.c"
    source.write_text("".join(f"void* {n}(void) {{ return 0; }}\n" for n in wanted if not hasattr(here, n)))
    for name in re.findall(r"NEEDED.*\[(libnv\S+)\]", dynamic):
        flags = ["-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", str(directory / name)]
        subprocess.run(["cc", *flags, str(source)], check=True)
    return directory


def _wheel(requirement: str) -> Path:
    """Kept in the user's cache directory; asked for again after a week, and as it was where that fails."""
    python = f"{sys.version_info.major}{sys.version_info.minor}"
    cache = cache_directory("contract-wheels", python, requirement)
    kept = sorted(cache.glob("*.whl"), key=lambda path: path.stat().st_mtime)
    if kept and time.time() - kept[-1].stat().st_mtime < _FRESH:
        return kept[-1]
    options = ["--no-deps", "--only-binary=:all:", "--quiet", "--timeout=15", "--retries=1"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(cache), requirement]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    found = sorted(cache.glob("*.whl"), key=lambda path: path.stat().st_mtime)
    if answer.returncode == 0 and found:
        found[-1].touch()
    if not found:
        reason = (answer.stderr.strip().splitlines() or ["no answer"])[-1]
        pytest.skip(f"no wheel of {requirement}: {reason}")
    return found[-1]
