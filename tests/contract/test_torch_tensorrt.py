"""Torch-TensorRT's own code on our networks: each operation that is left has a converter, and nothing reads bytes."""

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent
NETWORKS = ("text_encoder", "unet", "vae_decoder", "clip_image", "clip_text", "qalign")


@pytest.fixture(scope="module")
def lowered(unpacked: Any, bindings: Callable[..., Any], tmp_path_factory: Any) -> Mapping[str, Any]:
    """Network -> what `lower_networks.py` prints of it. These two releases belong together."""
    _, environment = bindings("tensorrt-cu13-bindings>=11.1,<11.2")
    wheel, writer = unpacked("torch-tensorrt==2.14.*"), HERE.parent / "integration/engine/conftest.py"
    environment["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    answer = subprocess.run(
        [sys.executable, str(HERE / "lower_networks.py"), str(wheel), str(writer), "miniature"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    lines = [json.loads(line) for line in answer.stdout.splitlines() if line.startswith("{")]
    return {line.pop("network"): line for line in lines}


@pytest.mark.parametrize("network", NETWORKS)
def test_every_operation_has_a_converter(lowered: Mapping[str, Any], network: str) -> None:
    assert lowered[network]["missing"] == []


@pytest.mark.parametrize("network", ["clip_image", "qalign"])
def test_nothing_but_a_cast_takes_the_pixels(lowered: Mapping[str, Any], network: str) -> None:
    assert set(lowered[network]["bytes read by"]) == {"aten_ops_clone_copy_dtype", "size_of_bytes"}
    assert lowered[network]["types"] == [["dtype.u8"], ["dtype.f32"]]


def test_the_decoder_gives_bytes(lowered: Mapping[str, Any]) -> None:
    assert lowered["vae_decoder"]["types"] == [["dtype.f32"], ["dtype.u8"]]
