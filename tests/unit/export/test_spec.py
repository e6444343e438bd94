"""Engine specs are refused before any work when something in them is unknown or impossible."""

import dataclasses
from pathlib import Path

import pytest

from ubgen.core.config import engine_spec_path, shipped_engine_specs
from ubgen.core.errors import UserError
from ubgen.export import load_spec, machine_problem
from ubgen.export.keys import find_inputs

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
        find_inputs(spec, None)


DECODER = "[networks.vae_decoder]\n"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (DECODER, "[networks.decoder]\n", r"unknown key 'networks\.decoder'; did you mean 'vae_decoder'"),
        ("max = 128", "maximum = 128", r"unknown key 'networks\.text_encoder\.batch\.maximum'"),
        (DECODER, DECODER + "options = { cuda_graph = true }\n", r"unknown key .*options\.cuda_graph'; did you mean"),
        ('precision = "float32"', 'precision = "float64"', "precision must be one of"),
        ('compiler = "onnxruntime"', 'compiler = "tensorr"', r"text_encoder\.compiler must be one of"),
        ("best = 16", "best = 512", r"networks\.text_encoder\.batch must have 1 <="),
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
        (DECODER, DECODER + 'options = { provider = "cuda" }\n', r'provider = "cuda" does not run on device = "cpu"'),
        (DECODER, DECODER + 'options = { provider = "tensorrt" }\n', r"options\.provider must be one of"),
        (DECODER, DECODER + "options = { cuda_graphs = true }\n", r'cuda_graphs needs device = "cuda", not "cpu"'),
        (DECODER, DECODER + "options = { freeze = true }\n", "freeze is an option of aotinductor, not of onnxruntime"),
        (DECODER, DECODER + "options = { refit = true }\n", "refit is an option of tensorrt, not of onnxruntime"),
        (DECODER, DECODER + 'compiler = "tensorrt"\n', r'vae_decoder\.compiler = "tensorrt" needs device = "cuda"'),
        (DECODER, DECODER + 'precision = "float8"\n', "float8. is not supported by .* use one of float32, float16"),
        (DECODER, DECODER + 'precision = "bfloat16"\n', '"bfloat16" is not supported by onnxruntime on device = "cpu"'),
        (DECODER, DECODER + 'keep_float32 = ["decoder"]\n', r'keep_float32 has no effect with precision = "float32"'),
        ("description", 'extends = "nothing"\ndescription', "engine spec 'nothing' is neither"),
    ],
)  # fmt: skip
def test_a_wrong_spec_is_refused_in_one_line(
    tmp_path: Path, text: str, old: str, new: str, message: str
) -> None:
    assert old in text
    path = spec_file(tmp_path, text.replace(old, new, 1))
    with pytest.raises(UserError, match=message) as caught:
        load_spec(path)
    assert str(caught.value).startswith(str(path)) or "extends" in new
    assert "\n" not in str(caught.value)


def test_a_spec_may_extend_another(tmp_path: Path) -> None:
    base = load_spec("miniature")
    text = """extends = "miniature"
        [parity]
        steps = 4
        [defaults]
        tolerance = 1e-2
        batch = { best = 8 }
        [networks.unet]
        tolerance = 2e-2"""
    spec = load_spec(spec_file(tmp_path, text))
    assert (spec.parity.steps, spec.parity.images, spec.weights) == (4, base.parity.images, base.weights)
    assert [network.tolerance for _, network in spec.networks.items()] == [1e-2, 2e-2, 1e-2, 1e-2, 1e-2, 1e-2]
    assert [network.batch.best for _, network in spec.networks.items()] == [8] * 6
    assert spec.networks.unet.batch.max == base.networks.unet.batch.max


def test_what_cannot_be_extended_is_named(tmp_path: Path) -> None:
    path = spec_file(tmp_path, f'extends = "{tmp_path / "spec.toml"}"')
    with pytest.raises(UserError, match=r"spec\.toml: extends must name another spec"):
        load_spec(path)
    path = spec_file(tmp_path, 'extends = "miniature"\ndefaults = 3')
    with pytest.raises(UserError, match=r"spec\.toml: defaults and networks must be tables"):
        load_spec(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("optimization_level = 6", r"optimization_level must be 0\.\.5, not 6"),
        ("workspace_gb = 0.0", "workspace_gb must be above 0"),
        ("max_autotune = true", "max_autotune is an option of aotinductor, not of tensorrt"),
        ('provider = "cuda"', "provider is an option of onnxruntime, not of tensorrt"),
    ],
)
def test_wrong_options_of_tensorrt(tmp_path: Path, options: str, message: str) -> None:
    text = engine_spec_path("sd15-fp16").read_text(encoding="utf-8")
    assert "cuda_graphs = true" in text
    with pytest.raises(UserError, match=rf"networks\.unet\.options\.{message}"):
        load_spec(spec_file(tmp_path, text.replace("cuda_graphs = true", options)))


def test_float8_with_a_later_opset(tmp_path: Path) -> None:
    path = spec_file(tmp_path, 'extends = "sd15-fp8"\n[networks.unet]\nopset = 23')
    with pytest.raises(UserError, match=r'precision = "float8" needs opset 18\.\.22, not 23'):
        load_spec(path)


def test_an_unknown_name_lists_the_shipped_ones() -> None:
    with pytest.raises(UserError, match=r"miniature, .*sd15-fp16"):
        load_spec("nothing-of-that-name")


def test_a_machine_without_a_gpu_says_so() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert "CUDA" in (machine_problem(load_spec("sd15-fp16")) or "")
    assert machine_problem(load_spec("miniature")) is None
