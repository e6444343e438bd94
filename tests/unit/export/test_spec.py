"""Engine specs are refused before any work when something in them is unknown or impossible."""

import dataclasses
from pathlib import Path

import pytest

from ubgen.core.config import engine_spec_path, shipped_engine_specs
from ubgen.core.errors import UserError
from ubgen.export import load_spec, why_not
from ubgen.export.sources import weight_directories

NAMES = ["text_encoder", "unet", "vae_decoder", "clip_image", "clip_text", "qalign"]
SHIPPED = {
    "sd15-fp16": ("cuda", {"tensorrt"}),
    "sd15-fp8": ("cuda", {"tensorrt"}),
    "sd15-aoti-bf16": ("cuda", {"aotinductor"}),
    "sd15-torch-trt-fp16": ("cuda", {"torch_tensorrt"}),
    "sd15-ort-cuda-fp16": ("cuda", {"onnxruntime"}),
    "sd15-cpu": ("cpu", {"onnxruntime"}),
    "miniature": ("cpu", {"onnxruntime"}),
    "miniature-aoti": ("cpu", {"aotinductor"}),
}


@pytest.fixture
def text() -> str:
    return engine_spec_path("miniature").read_text(encoding="utf-8")


def spec_file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "spec.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_all_shipped_specs_are_here() -> None:
    assert set(shipped_engine_specs()) == set(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_spec(name: str) -> None:
    spec = load_spec(name)
    assert [network for network, _ in spec.networks.items()] == NAMES
    assert (spec.device, {network.compiler for _, network in spec.networks.items()}) == SHIPPED[name]
    assert spec.image_size == (64 if name.startswith("miniature") else 512)
    assert spec.parity.images == 16
    assert len(spec.description) < 100
    assert "\n" not in spec.description


def test_weights_can_be_replaced_and_do_not_count_as_content() -> None:
    spec, other = load_spec("miniature"), load_spec("miniature", clip="/else/where", qalign=None)
    assert other.weights.clip == "/else/where"
    assert other.weights.qalign == spec.weights.qalign
    described = dataclasses.replace(other, description="another")
    assert described.content() == spec.content()


def test_weights_that_a_spec_leaves_out_must_be_given() -> None:
    spec = load_spec("sd15-cpu", stable_diffusion="ubgen:miniature/weights/stable-diffusion")
    with pytest.raises(UserError, match=r"^--clip: this spec names no weights of its own"):
        weight_directories(spec)


UNET = '[networks.unet]\ncompiler = "onnxruntime"\nopset = 23\n'


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[networks.unet]", "[networks.unit]", r"unknown key 'networks\.unit'; did you mean 'unet'"),
        ("max = 128", "maximum = 128", r"unknown key 'networks\.unet\.batch\.maximum'"),
        (
            UNET,
            UNET + "options = { cuda_graph = true }\n",
            r"unknown key .*options\.cuda_graph'; did you mean",
        ),
        ('precision = "float32"', 'precision = "float64"', "precision must be one of"),
        ('compiler = "onnxruntime"', 'compiler = "tensorr"', r"text_encoder\.compiler must be one of"),
        (
            "min = 1, best = 16, max = 128",
            "min = 1, best = 512, max = 128",
            r"networks\.unet\.batch must have 1 <=",
        ),
        ("tolerance = 1e-4", "tolerance = -1.0", r"tolerance must be above 0"),
        ("tolerance = 1e-4", "tolerance = nan", r"tolerance must be above 0"),
        ("tolerance = 1e-4", 'tolerance = "small"', r"tolerance must be of type float"),
        ("opset = 23", "opset = 9", r"opset must be 18\.\.23, not 9"),
        ("steps = 10", "steps = 1", r"parity\.images and parity\.steps must be at least 2"),
        ("[weights]", "[weights", "not valid TOML"),
        ("image_size = 64", "image_size = 60", "image_size must be a multiple of 8 pixels, not 60"),
        ("within_one_level = 0.999", "within_one_level = 1.5", "within_one_level at most 1"),
        ('device = "cpu"', 'device = "tpu"', "device must be one of"),
        ('device = "cpu"', 'device = "cuda"', r'provider = "cpu" does not run on device = "cuda"'),
        (
            UNET,
            UNET + 'options = { provider = "cuda" }\n',
            r'unet\.options\.provider = "cuda" does not run on',
        ),
        (UNET, UNET + "options = { cuda_graphs = true }\n", r'cuda_graphs needs device = "cuda", not "cpu"'),
        (
            UNET,
            UNET + "options = { freeze = true }\n",
            "freeze is a setting of aotinductor, not of onnxruntime",
        ),
        (UNET, UNET + "options = { refit = true }\n", "refit is a setting of tensorrt, not of onnxruntime"),
        (
            UNET,
            '[networks.unet]\ncompiler = "tensorrt"\nopset = 23\n',
            r'unet\.compiler = "tensorrt" needs device = "cuda"',
        ),
        (
            UNET + 'precision = "float32"',
            UNET + 'precision = "float8"',
            r'precision = "float8" needs compiler = "tensorrt", not "onnxruntime"',
        ),
        (
            UNET + 'precision = "float32"',
            UNET + 'precision = "bfloat16"',
            "bfloat16.* has no kernels in ONNX Runtime on the CPU",
        ),
        (
            UNET,
            UNET + 'keep_float32 = ["unet.conv_in"]\n',
            r'keep_float32 says nothing at precision = "float32"',
        ),
    ],
)
def test_a_wrong_spec_is_refused_in_one_line(
    tmp_path: Path, text: str, old: str, new: str, message: str
) -> None:
    assert old in text
    path = spec_file(tmp_path, text.replace(old, new, 1))
    with pytest.raises(UserError, match=message) as caught:
        load_spec(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("optimization_level = 6", r"optimization_level must be 0\.\.5, not 6"),
        ("workspace_gb = 0.0", "workspace_gb must be above 0"),
        ("max_autotune = true", "max_autotune is a setting of aotinductor, not of tensorrt"),
        ('provider = "tensorrt"', "provider is a setting of onnxruntime, not of tensorrt"),
    ],
)
def test_wrong_options_of_tensorrt(tmp_path: Path, options: str, message: str) -> None:
    text = engine_spec_path("sd15-fp16").read_text(encoding="utf-8")
    assert "cuda_graphs = true" in text
    with pytest.raises(UserError, match=rf"networks\.unet\.options\.{message}"):
        load_spec(spec_file(tmp_path, text.replace("cuda_graphs = true", options)))


def test_float8_with_a_later_opset(tmp_path: Path) -> None:
    text = engine_spec_path("sd15-fp8").read_text(encoding="utf-8")
    with pytest.raises(UserError, match=r'precision = "float8" needs opset 18\.\.22, not 23'):
        load_spec(spec_file(tmp_path, text.replace("opset = 20", "opset = 23")))


def test_an_unknown_name_lists_the_shipped_ones() -> None:
    with pytest.raises(UserError, match=r"miniature, .*sd15-fp16"):
        load_spec("nothing-of-that-name")


def test_a_machine_without_a_gpu_says_so() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert "CUDA" in (why_not(load_spec("sd15-fp16")) or "")
    assert why_not(load_spec("miniature")) is None
