"""The parts "build" and "tests": the native kernels compiled here, and the tests that need a GPU."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench.gpu_suite.suite import Settings, Suite

NATIVE = "UBGEN_NATIVE_DIR"


def build(suite: Suite) -> None:
    """Where the tools are and the device is a GPU; otherwise a library that is there already is used."""
    for tool in ("cmake", "nvcc"):
        if shutil.which(tool) is None:
            suite.skip("build", f"{tool} is not on the PATH; an installed library is used if there is one")
            return
    if suite.device == "cpu":
        suite.skip("build", "only for a GPU; an installed library is used if there is one")
        return
    tree, source = suite.settings.work / "kernels", suite.settings.repository
    # this GPU's architecture alone: the others take their time
    options = [
        "-DCMAKE_BUILD_TYPE=Release",
        "-DBUILD_TESTING=OFF",
        f"-DUBGEN_CUDA_ARCHITECTURES={_architecture()}",
    ]
    _call(suite, "configure", ["cmake", "-S", str(source), "-B", str(tree), *options])
    _call(suite, "compile", ["cmake", "--build", str(tree), "--parallel", str(os.cpu_count() or 1)])
    native = native_directory(suite.settings)
    native.mkdir(exist_ok=True)
    for library in tree.rglob("libubgen_kernels*.so"):
        shutil.copy(library, native)
    suite.fact(libraries=sorted(file.name for file in native.iterdir()))


def native_directory(settings: Settings) -> Path:
    """Where this run's own build goes."""
    return settings.work / "native"


def wait_for_build(settings: Settings, seconds: float = 120) -> None:
    """Until the part "build" of this run is over, if there is one; then `use_built`."""
    path, end = settings.work / "build.json", time.monotonic() + seconds
    while path.exists() and "seconds" not in json.loads(path.read_text(encoding="utf-8")):
        if time.monotonic() > end:
            break
        time.sleep(0.2)
    use_built(settings)


def use_built(settings: Settings) -> None:
    """From here on this process loads the library of this run, where there is one."""
    if any(native_directory(settings).glob("*.so")):
        os.environ[NATIVE] = str(native_directory(settings))


def tests(suite: Suite) -> None:
    """`pytest -m gpu`; on a CPU only those that need one are looked at, and skipped."""
    use_built(suite.settings)
    where = ["tests/gpu"] if suite.small else []
    report = suite.settings.out / "pytest.log"
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-rs", "-p", "no:cacheprovider", *where]
    with report.open("w", encoding="utf-8") as log:
        result = subprocess.run(
            command,
            cwd=suite.settings.repository,
            stdout=log,
            stderr=subprocess.STDOUT,
            timeout=max(1.0, suite.left()),
            check=False,
        )
    text = report.read_text(encoding="utf-8")
    counts: dict[str, Any] = {
        word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)\b", text)
    }
    suite.add(exit_code=result.returncode, **counts)
    if result.returncode not in (0, 5):  # 5: nothing was collected
        failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", text, re.MULTILINE)
        suite.skip(
            "pytest -m gpu", f"exit code {result.returncode}; {', '.join(failed[:8]) or 'see pytest.log'}"
        )


def _architecture() -> str:
    """In a process of its own: this one must not touch the GPU before it forks."""
    code = "import torch; print(''.join(map(str, torch.cuda.get_device_capability())))"
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()


def _call(suite: Suite, what: str, command: list[str]) -> None:
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=max(1.0, suite.left()), check=False
    )
    print(result.stdout[-4000:], result.stderr[-4000:], flush=True)
    if result.returncode:
        lines = (result.stderr or result.stdout).strip().splitlines()
        raise RuntimeError(
            f"{what} failed: {next((x for x in lines if 'rror' in x), lines[-1] if lines else '')}"
        )
