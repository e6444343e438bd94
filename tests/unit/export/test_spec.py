"""Engine specs are refused before any work when something in them is unknown or impossible."""

from pathlib import Path

import pytest

from ubgen.config import engine_spec_path
from ubgen.errors import UserError
from ubgen.export import load_spec


@pytest.fixture
def text() -> str:
    return engine_spec_path("miniature").read_text(encoding="utf-8")


def spec_file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "spec.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_shipped_spec(text: str) -> None:
    spec = load_spec("miniature")
    names = [name for name, _ in spec.networks.items()]
    assert names == ["text_encoder", "unet", "vae_decoder", "clip_image", "clip_text", "qalign"]
    assert all(network.compiler == "onnxruntime" for _, network in spec.networks.items())


def test_weights_can_be_replaced_and_do_not_count_as_content() -> None:
    spec, other = load_spec("miniature"), load_spec("miniature", clip="/else/where", qalign=None)
    assert other.weights.clip == "/else/where"
    assert other.weights.qalign == spec.weights.qalign
    assert other.content() == spec.content()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[networks.unet]", "[networks.unit]", r"unknown key 'networks\.unit'; did you mean 'unet'"),
        ("max = 256", "maximum = 256", r"unknown key 'networks\.unet\.batch\.maximum'"),
        ('precision = "float32"', 'precision = "float8"', "precision must be one of"),
        ('compiler = "onnxruntime"', 'compiler = "tensorr"', "compiler 'tensorr' is not known here"),
        (
            "best = 32, max = 256",
            "best = 512, max = 256",
            r"networks\.unet\.batch must have 1 <= min <= best <= max",
        ),
        ("tolerance = 1e-4", "tolerance = -1.0", r"tolerance must be above 0"),
        ("tolerance = 1e-4", 'tolerance = "small"', r"tolerance must be of type float"),
        ("steps = 10", "steps = 1", r"parity\.steps must be at least 2"),
        ("[weights]", "[weights", "not valid TOML"),
        ('clip = "ubgen:miniature/weights/clip"\n', "", r"missing key 'weights\.clip'"),
    ],
)
def test_a_wrong_spec_is_refused_in_one_line(
    tmp_path: Path, text: str, old: str, new: str, message: str
) -> None:
    assert old in text
    path = spec_file(tmp_path, text.replace(old, new, 1))
    with pytest.raises(UserError, match=message) as caught:
        load_spec(path)
    assert str(path) in str(caught.value) or "compiler" in message
    assert "\n" not in str(caught.value)


def test_an_unknown_name_lists_the_shipped_ones() -> None:
    with pytest.raises(UserError, match="miniature"):
        load_spec("nothing-of-that-name")
