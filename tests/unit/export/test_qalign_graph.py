import importlib.util
from pathlib import Path
from types import ModuleType

import onnxruntime
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ubgen.core.config import resolve_path
from ubgen.core.errors import UserError
from ubgen.export.compilers.onnx import export_onnx
from ubgen.export.cost import count_flops
from ubgen.export.exportable import Exportable
from ubgen.export.qalign_graph import QAlignScorer
from ubgen.export.spec import BatchRange, NetworkSpec
from ubgen.rewards import QAlign

GOLDEN = Path(__file__).parents[2] / "golden/qalign"
RTOL = 1e-5
BATCH = BatchRange(1, 2, 8)
PROMPTS = {
    "image inside": [1, 5, 6, 9, -200, 7, 8],
    "image last": [1, 5, 6, -200],
    "image first": [-200, 7, 8],
    "image alone": [-200],
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    """bench/qalign_cost.py, which also knows the 7B sizes and the naive forward pass."""
    path = Path(__file__).parents[3] / "bench/qalign_cost.py"
    spec = importlib.util.spec_from_file_location("qalign_cost", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def miniature() -> QAlign:
    return QAlign.load(resolve_path("ubgen:miniature/weights/qalign"))


def golden(dtype: torch.dtype = torch.float32, prompt: list[int] | None = None) -> QAlign:
    """The reference's weights, with a prompt that their small vocabulary has."""
    model = QAlign.load(GOLDEN, dtype=dtype)
    config = model.config | {"scoring": model.config["scoring"] | {"prompt_ids": prompt or [1, 5, -200, 7]}}
    with torch.device("meta"):
        other = QAlign(config)
    other.load_state_dict(model.state_dict(), assign=True)
    other.model.rope_cos, other.model.rope_sin = model.model.rope_cos, model.model.rope_sin
    other.level_weights = model.level_weights
    return other.eval().requires_grad_(False)


def draw(batch: int, height: int, width: int) -> Tensor:
    return torch.randint(0, 256, (batch, height, width, 3), dtype=torch.uint8)


def score(model: QAlign, pixels: Tensor) -> Tensor:
    return model.score(pixels.permute(0, 3, 1, 2).float() / 255)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (80, 80), (40, 90), (33, 20)])
def test_equals_the_score_of_the_miniature_at_any_size(miniature, height, width):
    pixels = draw(3, height, width)
    ours = QAlignScorer(miniature)(pixels)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, score(miniature, pixels), rtol=RTOL, atol=0)


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS.keys())
def test_equals_the_score_wherever_the_image_stands_in_the_prompt(prompt):
    model, pixels = golden(prompt=prompt), draw(3, 56, 56)
    torch.testing.assert_close(QAlignScorer(model)(pixels), score(model, pixels), rtol=RTOL, atol=0)


def test_the_text_before_the_image_counts():
    pixels = draw(2, 56, 56)
    one, other = (QAlignScorer(golden(prompt=[1, word, -200, 7]))(pixels) for word in (5, 9))
    assert (one - other).abs().min() > 1e-3


@pytest.mark.parametrize("case", ["b1", "b3"])
def test_equals_the_public_implementation(case):
    inputs, outputs = load_file(GOLDEN / "inputs.safetensors"), load_file(GOLDEN / "outputs.safetensors")
    scorer = QAlignScorer(golden(prompt=inputs[f"{case}.input_ids"][0].tolist()))
    ours = scorer.score_pixels(inputs[f"{case}.pixel_values"])
    torch.testing.assert_close(ours, outputs[f"{case}.score"], rtol=RTOL, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_is_as_exact_in_half_precision_as_the_unfolded_network(dtype):
    pixels = draw(32, 56, 56)
    exact = score(golden(), pixels)
    theirs = (score(golden(dtype), pixels) - exact).square().mean().sqrt()
    for scorer in (QAlignScorer(golden(dtype)), QAlignScorer(golden()).to(dtype)):
        assert {t.dtype for t in scorer.state_dict().values() if t.shape != (5,)} == {dtype}
        ours = scorer(pixels)
        assert ours.dtype == torch.float32
        assert not torch.equal(ours, ours.to(dtype).float())
        assert (ours - exact).square().mean().sqrt() < 1.25 * theirs


def test_keeps_the_weights_that_a_score_needs_and_no_copy_of_them(miniature):
    scorer = QAlignScorer(miniature)
    theirs = {tensor.data_ptr() for tensor in miniature.parameters()}
    own = {name for name, tensor in scorer.named_parameters() if tensor.data_ptr() not in theirs}
    assert own == {"head.weight"}
    unused = (miniature.model.embed_tokens.weight, miniature.lm_head.weight)
    kept = sum(p.numel() for p in scorer.parameters()) - scorer.head.weight.numel()
    assert kept == sum(p.numel() for p in miniature.parameters()) - sum(p.numel() for p in unused)


def test_a_prompt_outside_the_vocabulary_is_refused():
    with pytest.raises(UserError, match=r"larger vocabulary than 320; set scoring\.prompt_ids"):
        QAlignScorer(QAlign.load(GOLDEN))


def export(scorer: QAlignScorer, opset: int, directory: Path, size: int) -> list[Path]:
    network = Exportable(scorer.eval(), [{"pixels": draw(2, size, size)}], "score")
    return export_onnx(network, NetworkSpec(BATCH, RTOL, opset=opset), directory / "qalign.onnx")


def run(file: Path, pixels: Tensor) -> Tensor:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"pixels": pixels.numpy()})[0])


@pytest.mark.parametrize(("opset", "embed_limit", "names"), [(20, 2**30, 1), (23, 2**10, 2)])
def test_equals_the_score_in_onnxruntime_at_every_batch(
    miniature, opset, embed_limit, names, tmp_path, monkeypatch
):
    monkeypatch.setattr("ubgen.export.compilers.onnx.EMBED_LIMIT", embed_limit)
    files = export(QAlignScorer(miniature), opset, tmp_path, 80)
    assert [file.name for file in files] == ["qalign.onnx", "qalign.onnx.data"][:names]
    for batch in (1, 2, 5):
        pixels = draw(batch, 80, 80)
        torch.testing.assert_close(run(files[0], pixels), score(miniature, pixels), rtol=RTOL, atol=0)


def test_only_the_positions_that_the_score_needs_are_computed():
    prompt = [1, 5, 6, 9, -200, 7, 8]
    model = golden(prompt=prompt)
    flops = count_flops(QAlignScorer(model), {"pixels": draw(1, 56, 56)})
    sizes = model.sizes
    width, inner = sizes.hidden_size, sizes.intermediate_size
    image = sizes.abstractor.num_learnable_queries + 1
    rest = image + len(prompt) - 1 - prompt.index(-200)
    seen = prompt.index(-200) + rest

    def layer(queries: int) -> int:
        keys_and_values, attention = 2 * rest * width * width, 2 * queries * seen * width
        return 2 * (keys_and_values + attention + 2 * queries * width * width + 3 * queries * width * inner)

    assert [flops["layers.0"], flops["layers.1"]] == [layer(rest), layer(1)]
    assert flops["layers"] == flops["layers.0"] + flops["layers.1"]
    assert flops["head"] == 2 * width * 5


def test_the_7b_network_costs_at_most_89_percent_of_the_naive_pass(bench):
    cost = bench.cost(bench.SEVEN_B)
    assert cost["total"]["full"] == pytest.approx(1.97e12, rel=0.01)
    assert cost["parts"]["vision tower"]["full"] == pytest.approx(0.73e12, rel=0.01)
    assert cost["ratio"] <= 0.89
    assert cost["parts"]["head"]["folded"] == 2 * 4096 * 5
    for part in ("vision tower", "abstractor"):
        assert cost["parts"][part]["folded"] == cost["parts"][part]["full"]
    untouched = 303_966_208 + 81_473_536 + 7_550_271_488 + 4096  # without the abstractor's fixed tables
    assert cost["parameters"] == untouched + 5 * 4096


def test_the_naive_pass_gives_the_same_score(bench, miniature):
    pixels = draw(2, 64, 64)
    torch.testing.assert_close(
        bench.FullForward(miniature)(pixels), score(miniature, pixels), rtol=RTOL, atol=0
    )


@pytest.mark.slow
def test_full_width_with_two_layers_exports_beyond_2_gb_and_matches(bench, tmp_path):
    config = bench.shallow(layers=2, vision_layers=1) | {"vocab_size": 64}
    config["visual_config"]["visual_abstractor"]["num_hidden_layers"] = 4
    config["scoring"] = {
        "prompt_ids": [*range(1, 16), -200, *range(16, 28)],  # as long as the real one
        "level_token_ids": [30, 31, 32, 33, 34],
    }
    model = QAlign.from_config(config).eval().requires_grad_(False)
    scorer, pixels = QAlignScorer(model), bench.random_images(1, 512)
    expected = score(model, pixels)
    torch.testing.assert_close(scorer(pixels), expected, rtol=RTOL, atol=0)
    del model
    files = export(scorer, 20, tmp_path, 512)
    assert [f.name for f in files] == ["qalign.onnx", "qalign.onnx.data"]
    assert files[0].stat().st_size < 2**24
    assert files[1].stat().st_size > 2**31
    del scorer
    torch.testing.assert_close(run(files[0], pixels), expected, rtol=RTOL, atol=0)
