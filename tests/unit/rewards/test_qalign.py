import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ubgen.core.errors import UserError
from ubgen.rewards import QAlign, pad_to_square, qalign_preprocess

GOLDEN = Path(__file__).parents[2] / "golden/qalign"
SEVEN_B = json.loads((Path(__file__).parents[3] / "bench/qalign-7b.json").read_text(encoding="utf-8"))


def tiny_config(**scoring: object) -> dict:
    config = json.loads((GOLDEN / "config.json").read_text())
    config["scoring"] |= {"prompt_ids": [1, 5, 6, -200, 7, 8]} | scoring
    return config


@pytest.fixture(scope="module")
def golden() -> QAlign:
    return QAlign.load(GOLDEN)


@pytest.fixture(scope="module")
def tiny() -> QAlign:
    torch.manual_seed(0)
    return QAlign.from_config(tiny_config()).eval().requires_grad_(False)


def states(model: QAlign, pixels: Tensor, ids: Tensor) -> dict[str, Tensor]:
    """The outputs that the golden file names, by forward hooks."""
    seen: dict[str, Tensor] = {}
    network = model.model
    watched = {
        "vision_embeddings": network.vision_model.embeddings,
        "vision_output": network.vision_model,
        "abstractor_output": network.visual_abstractor,
    }
    stacks = {
        "vision_layer": network.vision_model.encoder.layers,
        "abstractor_layer": network.visual_abstractor.encoder.layers,
        "llama_layer": network.layers,
    }
    watched |= {f"{name}_{i}": layer for name, stack in stacks.items() for i, layer in enumerate(stack)}

    def keep(name: str, module: nn.Module) -> torch.utils.hooks.RemovableHandle:
        return module.register_forward_hook(lambda _, __, out: seen.__setitem__(name, out))

    handles = [keep(name, module) for name, module in watched.items()]
    seen["llama_norm"] = network.norm(model.hidden_states(pixels, ids))
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("case", ["b1", "b3"])
def test_every_layer_equals_the_reference(golden, case):
    inputs, outputs = load_file(GOLDEN / "inputs.safetensors"), load_file(GOLDEN / "outputs.safetensors")
    pixels, ids = inputs[f"{case}.pixel_values"], inputs[f"{case}.input_ids"]
    seen = states(golden, pixels, ids)
    assert len(seen) == 10
    for name, value in seen.items():
        torch.testing.assert_close(value, outputs[f"{case}.{name}"], rtol=0, atol=1e-4)
    logits = golden.lm_head(seen["llama_norm"])
    torch.testing.assert_close(logits, outputs[f"{case}.logits_all"], rtol=0, atol=2e-4)
    torch.testing.assert_close(logits[:, -1], outputs[f"{case}.logits_last"], rtol=0, atol=2e-4)
    levels = golden.level_logits(pixels, ids)
    torch.testing.assert_close(levels, outputs[f"{case}.level_logits"], rtol=0, atol=2e-4)


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("case", ["b1", "b3"])
def test_score_and_gradient_equal_the_reference(golden, case, checkpoint):
    inputs, outputs = load_file(GOLDEN / "inputs.safetensors"), load_file(GOLDEN / "outputs.safetensors")
    pixels = inputs[f"{case}.pixel_values"].requires_grad_()
    score = golden.score_pixels(pixels, inputs[f"{case}.input_ids"], checkpoint=checkpoint)
    torch.testing.assert_close(score, outputs[f"{case}.score"], rtol=0, atol=5e-5)
    score.sum().backward()
    expected = outputs[f"{case}.grad_pixel_values"]
    assert (pixels.grad - expected).abs().max() < 2e-4 * expected.abs().max()
    assert all(p.grad is None for p in golden.parameters())


def test_layers_that_stay_in_the_hosts_memory_come_when_they_are_called(golden):
    """The same score and gradient to the bit; and on another device ("meta" holds shapes) no layer lies there."""
    pixels, ids = (
        load_file(GOLDEN / "inputs.safetensors")[f"b3.{name}"] for name in ("pixel_values", "input_ids")
    )
    offloaded = QAlign.load(GOLDEN, offloaded=True)
    results = []
    for model in (golden, offloaded):
        leaf = pixels.clone().requires_grad_()
        score = model.score_pixels(leaf, ids)
        score.sum().backward()
        results.append((score, leaf.grad))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    elsewhere = QAlign.load(GOLDEN, device="meta", offloaded=True)
    places = {name: tensor.device.type for name, tensor in elsewhere.named_parameters()}
    assert {places[name] for name in places if ".layers." in name} == {"cpu"}
    assert {places[name] for name in places if ".layers." not in name} == {"meta"}
    before, after = ids[:, :1].to("meta"), ids[:, -1:].to("meta")
    assert elsewhere.model(pixels.to("meta"), before, after).device.type == "meta"


def test_position_tables_of_a_fresh_network_are_the_checkpoints():
    fresh, loaded = QAlign.from_config(tiny_config()).state_dict(), load_file(GOLDEN / "model.safetensors")
    tables = [name for name in loaded if name.endswith("_pos_embed")]
    assert len(tables) == 4
    for name in tables:
        torch.testing.assert_close(fresh[name], loaded[name], rtol=0, atol=1e-6)


def test_the_7b_network_has_the_public_checkpoints_tensors():
    with torch.device("meta"):
        state = QAlign(SEVEN_B).state_dict()
    rows = [line.split("\t") for line in (GOLDEN / "checkpoint_keys.tsv").read_text().splitlines()[1:]]
    expected = {
        pattern.replace("{i}", str(i)): tuple(int(n) for n in shape.split(",") if n)
        for pattern, shape, copies in rows
        for i in range(int(copies))
    }
    assert len(expected) == 862
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == expected
    sizes: Counter[str] = Counter()
    for name, tensor in state.items():
        sizes[".".join(name.split(".")[:2])] += tensor.numel()
    assert sizes == {
        "model.vision_model": 303_966_208,
        "model.visual_abstractor": 88_164_352,
        "model.layers": 7_550_271_488,
        "model.embed_tokens": 131_072_000,
        "lm_head.weight": 131_072_000,
        "model.norm": 4096,
    }


def test_scores_any_size_within_the_levels_and_lets_gradient_through(tiny):
    for height, width in ((56, 56), (64, 64), (33, 90), (120, 47)):
        images = torch.rand(2, 3, height, width, requires_grad=True)
        score = tiny.score(images)
        assert score.shape == (2,)
        assert ((score >= 1) & (score <= 5)).all()
        score.sum().backward()
        assert images.grad.abs().amax((1, 2, 3)).min() > 0


def test_other_shapes_are_padded_first(tiny):
    images = torch.rand(2, 3, 40, 70)
    padded = qalign_preprocess(pad_to_square(images), 56, fit="pad")
    torch.testing.assert_close(tiny.score(images), tiny.score_pixels(padded))


def test_rows_do_not_depend_on_each_other(tiny):
    images = torch.rand(3, 3, 64, 64)
    alone = torch.cat([tiny.score(image[None]) for image in images])
    torch.testing.assert_close(tiny.score(images), alone, rtol=0, atol=2e-6)


def test_the_configs_prompt_is_the_default_one(tiny):
    pixels = torch.randn(2, 3, 56, 56)
    given = tiny.score_pixels(pixels, torch.tensor([[1, 5, 6, -200, 7, 8]] * 2))
    assert torch.equal(tiny.score_pixels(pixels), given)
    assert not torch.equal(tiny.score_pixels(pixels, torch.tensor([1, 5, 9, -200, 7, 8])), given)


def test_equal_logits_score_three_and_one_level_its_weight(tiny):
    pixels = torch.randn(2, 3, 56, 56)
    model = QAlign.from_config(tiny_config(level_token_ids=[4, 4, 4, 4, 4]))
    torch.testing.assert_close(model.score_pixels(pixels), torch.full((2,), 3.0))
    model = QAlign.from_config(tiny_config(level_token_ids=[4], level_weights=[2.0]))
    torch.testing.assert_close(model.score_pixels(pixels), torch.full((2,), 2.0))


def test_a_fresh_network_learns_to_tell_bright_from_dark():
    torch.manual_seed(0)
    model = QAlign.from_config(tiny_config())
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(20):
        level = torch.rand(8)
        images = level[:, None, None, None].expand(-1, 3, 56, 56)
        loss = (model.score(images) - (1 + 4 * level)).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    dark, bright = model.score(torch.tensor([0.1, 0.9])[:, None, None, None].expand(-1, 3, 56, 56))
    assert bright > dark + 1


def test_the_score_stays_in_float32_under_autocast(tiny):
    images = torch.rand(2, 3, 64, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        score = tiny.score(images)
    assert score.dtype == torch.float32
    assert not torch.equal(score, score.bfloat16().float())
    torch.testing.assert_close(score, tiny.score(images), rtol=0, atol=0.1)


def test_exports_with_a_dynamic_batch(tiny):
    program = torch.export.export(
        tiny, (torch.randn(2, 3, 56, 56),), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},)
    )
    for batch in (1, 5):
        pixels = torch.randn(batch, 3, 56, 56)
        torch.testing.assert_close(program.module()(pixels), tiny.score_pixels(pixels))


def test_save_then_load_in_half_precision(tiny, tmp_path):
    tiny.save(tmp_path / "q")
    images = torch.rand(2, 3, 64, 64)
    assert torch.equal(QAlign.load(tmp_path / "q").score(images), tiny.score(images))
    half = QAlign.load(tmp_path / "q", dtype=torch.bfloat16)
    assert {t.dtype for t in half.state_dict().values()} == {torch.bfloat16}
    score = half.score(images)
    assert score.dtype == torch.float32
    torch.testing.assert_close(score, tiny.score(images), rtol=0, atol=0.1)


def shards(tiny: QAlign) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights in two halves, with the table that older checkpoints carry."""
    items = list(tiny.state_dict().items())
    second = dict(items[50:]) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    return dict(items[:50]), second


def write_config(directory: Path) -> None:
    (directory / "config.json").write_text(json.dumps(tiny_config()))


def safetensors_shards(directory: Path, tiny: QAlign) -> None:
    for number, part in enumerate(shards(tiny), 1):
        save_file(part, directory / f"model-0000{number}-of-00002.safetensors")


def indexed_shards(directory: Path, tiny: QAlign) -> None:
    names = ("a.safetensors", "b.safetensors")
    for name, part in zip(names, shards(tiny), strict=True):
        save_file(part, directory / name)
    save_file({"unrelated": torch.ones(1)}, directory / "c.safetensors")
    table = {key: name for name, part in zip(names, shards(tiny), strict=True) for key in part}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))


def pickled_shards(directory: Path, tiny: QAlign) -> None:
    for number, part in enumerate(shards(tiny), 1):
        old = number == 1  # one in the format before torch 1.6
        file = directory / f"pytorch_model-0000{number}-of-00002.bin"
        torch.save(part, file, _use_new_zipfile_serialization=not old)


@pytest.mark.parametrize("write", [safetensors_shards, indexed_shards, pickled_shards])
def test_loads_several_files(tiny, tmp_path, write):
    write_config(tmp_path)
    write(tmp_path, tiny)
    images = torch.rand(2, 3, 64, 64)
    assert torch.equal(QAlign.load(tmp_path).score(images), tiny.score(images))


def broken(tmp_path: Path, tiny: QAlign, **changes: Tensor | None) -> Path:
    write_config(tmp_path)
    state = tiny.state_dict() | changes
    save_file({k: v for k, v in state.items() if v is not None}, tmp_path / "model.safetensors")
    return tmp_path


def test_a_missing_tensor_is_named(tiny, tmp_path):
    with pytest.raises(UserError, match=r"lack the tensor 'model\.norm\.weight'$"):
        QAlign.load(broken(tmp_path, tiny, **{"model.norm.weight": None}))


def test_an_unexpected_tensor_is_named(tiny, tmp_path):
    with pytest.raises(UserError, match=r"model\.safetensors: unexpected tensor 'extra'"):
        QAlign.load(broken(tmp_path, tiny, extra=torch.ones(1)))


def test_a_wrong_shape_is_named(tiny, tmp_path):
    with pytest.raises(UserError, match=r"'model\.norm\.weight' has the shape \(65,\).*\(64,\)"):
        QAlign.load(broken(tmp_path, tiny, **{"model.norm.weight": torch.ones(65)}))


def test_a_missing_directory_or_file_is_named(tiny, tmp_path):
    with pytest.raises(UserError, match=r"nowhere.*no config\.json"):
        QAlign.load(tmp_path / "nowhere")
    write_config(tmp_path)
    with pytest.raises(UserError, match="no Q-Align weights"):
        QAlign.load(tmp_path)
    table = {"model.norm.weight": "gone.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    with pytest.raises(UserError, match=r"names gone\.safetensors, which is missing"):
        QAlign.load(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_damaged_file_is_one_clear_line(tmp_path, name):
    write_config(tmp_path)
    (tmp_path / name).write_bytes(b"not weights at all")
    with pytest.raises(
        UserError, match=f"{name}(: not a readable weight file| is not a safetensors file)"
    ) as error:
        QAlign.load(tmp_path)
    assert "\n" not in str(error.value)


def test_a_pickle_that_is_more_than_tensors_is_refused(tmp_path):
    write_config(tmp_path)
    torch.save({"model.norm.weight": Path("x")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="not a readable weight file"):
        QAlign.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": None}, "lacks the field 'hidden_size'"),
        ({"visual_config": None}, "no section 'visual_config'"),
        ({"num_key_value_heads": 2}, "num_key_value_heads must be 4, not 2"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling must be None"),
        ({"num_attention_heads": 5, "num_key_value_heads": 5}, "num_attention_heads"),
        ({"scoring": {"prompt_ids": [1, 2, 3]}}, "marker -200 once"),
        ({"scoring": {"level_token_ids": [1], "level_weights": [1.0]}, "vocab_size": 1}, "level_token_ids"),
    ],
)
def test_a_bad_config_names_the_field(change, message):
    with pytest.raises(UserError, match=message):
        QAlign.from_config(tiny_config() | change)


def test_the_standard_prompt_needs_its_vocabulary(golden):
    with pytest.raises(UserError, match=r"scoring\.prompt_ids"):
        golden.score(torch.rand(1, 3, 56, 56))


def test_wrong_pixels_or_ids(tiny):
    with pytest.raises(ValueError, match=r"\(B, 3, 56, 56\), not \(1, 3, 64, 64\)"):
        tiny.score_pixels(torch.rand(1, 3, 64, 64))
    for ids in ([[1, 2, 3]], [[-200, 1, -200]], [[-200, 1, 2], [1, -200, 2]]):
        with pytest.raises(ValueError, match="marker -200 once per row"):
            tiny.score_pixels(torch.rand(len(ids), 3, 56, 56), torch.tensor(ids))


@pytest.mark.parametrize(
    "name", ["model.safetensors", "pytorch_model.bin", "model.safetensors.index.json", "config.json"]
)
def test_a_git_lfs_pointer_is_named_before_anything_is_loaded(tmp_path, name):
    write_config(tmp_path)
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(UserError, match=f"{name} is a Git LFS pointer"):
        QAlign.load(tmp_path)
