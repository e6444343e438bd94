"""ubgen-doctor on directories of weights: the miniature's, and such in which one thing is wrong."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ubgen.cli import doctor
from ubgen.cli.weights import COLOURS, Check, check_weights
from ubgen.core.config import resolve_path
from ubgen.rewards import Clip, QAlign

MINIATURE = resolve_path("ubgen:miniature/weights")


def verdicts(
    stable_diffusion: Path | None = None, clip: Path | None = None, qalign: Path | None = None
) -> dict:
    """Check by the part of its name after the family's."""
    paths = (None if path is None else str(path) for path in (stable_diffusion, clip, qalign))
    return {check.name.partition(": ")[2]: check for check in check_weights(*paths, device="cpu")}


def only_wrong(checks: dict[str, Check]) -> Check:
    (wrong,) = [check for check in checks.values() if not check.ok]
    assert "\n" not in wrong.detail
    return wrong


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(MINIATURE, tmp_path / "weights"))


def scrambled(file: Path, prefix: str = "") -> None:
    """Random values of the same size in the tensors whose names start with `prefix`."""
    torch.manual_seed(0)
    tensors = load_file(file)
    changed = {n: torch.randn_like(t) * t.float().std() for n, t in tensors.items() if n.startswith(prefix)}
    changed = {n: t for n, t in changed.items() if t.ndim > 1}
    assert changed
    save_file(tensors | changed, file, {"format": "pt"})


def test_the_miniature_is_fine(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    options = ["stable-diffusion", "clip", "qalign"]
    arguments = [part for name in options for part in (f"--{name}", f"ubgen:miniature/weights/{name}")]
    monkeypatch.setattr("sys.argv", ["ubgen-doctor", *arguments, "--device", "cpu", "--json"])
    doctor.main()
    checks = json.loads(capsys.readouterr().out)
    assert len(checks) == 11
    assert all(check["ok"] for check in checks), checks
    assert {check["name"].partition(":")[0] for check in checks} == {"Stable Diffusion", "CLIP", "Q-Align"}


def test_a_failed_check_is_shown_and_sets_the_exit_status(
    copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (copy / "clip" / "open_clip_model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setattr("sys.argv", ["ubgen-doctor", "--clip", str(copy / "clip"), "--device", "cpu"])
    with pytest.raises(SystemExit) as caught:
        doctor.main()
    assert caught.value.code == 1
    (row,) = [line for line in capsys.readouterr().out.splitlines() if " CLIP: files " in line]
    assert row.split("│")[2].strip() == "wrong"
    assert "is a Git LFS pointer" in row


def test_a_scaling_factor_of_another_vae(copy: Path) -> None:
    """What is right is in the message."""
    file = copy / "stable-diffusion" / "vae" / "config.json"
    config = json.loads(file.read_text())
    right = config["scaling_factor"]
    file.write_text(json.dumps({**config, "scaling_factor": 2.0}))
    checks = verdicts(copy / "stable-diffusion")
    assert not checks["VAE"].ok
    assert "standard deviation 6" in checks["VAE"].detail
    proposed = float(checks["VAE"].detail.partition("to about ")[2].partition(",")[0])
    assert right / 2 < proposed < right * 2
    assert not checks["UNet on the VAE's latents"].ok


def test_an_encoder_and_a_decoder_that_do_not_fit(copy: Path) -> None:
    scrambled(copy / "stable-diffusion" / "vae" / "diffusion_pytorch_model.safetensors", "decoder.")
    wrong = only_wrong(verdicts(copy / "stable-diffusion"))
    assert wrong.name == "Stable Diffusion: VAE"
    assert "encoder and decoder do not fit" in wrong.detail


def test_a_unet_that_denoises_nothing(copy: Path) -> None:
    scrambled(copy / "stable-diffusion" / "unet" / "diffusion_pytorch_model.safetensors")
    wrong = only_wrong(verdicts(copy / "stable-diffusion"))
    assert wrong.name == "Stable Diffusion: UNet on the VAE's latents"
    assert "no better than guessing" in wrong.detail


def test_a_scheduler_of_another_prediction_type(copy: Path) -> None:
    file = copy / "stable-diffusion" / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "prediction_type": "v_prediction"}))
    assert "prediction_type is wrong" in only_wrong(verdicts(copy / "stable-diffusion")).detail


def test_a_tokenizer_that_is_missing_or_of_another_model(
    copy: Path, tmp_path: Path, write_transformers_clip: Callable[..., Path]
) -> None:
    directory = copy / "stable-diffusion" / "tokenizer"
    shutil.rmtree(directory)
    assert "tokenizer is missing" in only_wrong(verdicts(copy / "stable-diffusion")).detail
    other = write_transformers_clip(tmp_path / "clip")
    directory.mkdir()
    for name in ("vocab.json", "merges.txt"):
        shutil.copyfile(other / name, directory / name)
    wrong = only_wrong(verdicts(copy / "stable-diffusion"))
    assert "it has 49408 tokens, the text encoder knows 272" in wrong.detail


def test_a_single_file_checkpoint_is_named_with_the_command_that_converts_it(tmp_path: Path) -> None:
    file = tmp_path / "v1-5-pruned-emaonly.safetensors"
    save_file({"x": torch.zeros(1)}, file)
    for path in (file, tmp_path):
        detail = only_wrong(verdicts(path)).detail
        assert f"P.from_single_file('{file}').save_pretrained('{file.with_suffix('')}')" in detail


def test_towers_of_two_clips(copy: Path) -> None:
    scrambled(copy / "clip" / "open_clip_model.safetensors", "token_embedding")
    wrong = only_wrong(verdicts(clip=copy / "clip"))
    assert wrong.name == "CLIP: what it sees"
    assert "its two towers do not fit" in wrong.detail


def test_a_clip_with_openais_vocabulary_is_asked_for_colours(
    tmp_path: Path, write_transformers_clip: Callable[..., Path]
) -> None:
    """Random weights know none; a few steps of training on them are enough."""
    torch.manual_seed(0)
    directory = write_transformers_clip(tmp_path / "clip")
    assert "of 8 plain colours apart" in only_wrong(verdicts(clip=directory)).detail
    learn_colours(directory)
    checks = verdicts(clip=directory)
    assert all(check.ok for check in checks.values())
    assert checks["what it sees"].detail == "tells 8 of 8 plain colours apart"


def learn_colours(directory: Path) -> None:
    from transformers import CLIPModel

    clip, model = Clip.load(directory), CLIPModel.from_pretrained(directory)
    tokens = clip.tokenizer([f"a photo of the color {name}" for name in COLOURS])
    swatches = torch.tensor(list(COLOURS.values()))[:, :, None, None].expand(-1, -1, 32, 32)
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.4815, 0.4578, 0.4082), (0.2686, 0.2613, 0.2758)))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(60):
        model(input_ids=tokens, pixel_values=(swatches - mean) / std, return_loss=True).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(directory)


def test_a_qalign_of_random_weights(copy: Path) -> None:
    torch.manual_seed(0)
    QAlign.from_config(json.loads((copy / "qalign" / "config.json").read_text())).save(copy / "qalign")
    wrong = only_wrong(verdicts(qalign=copy / "qalign"))
    assert wrong.name == "Q-Align: what it prefers"
    assert "it does not rank by quality" in wrong.detail


def test_a_qalign_whose_weights_are_of_another_config(copy: Path) -> None:
    file = copy / "qalign" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "hidden_size": 48}))
    assert "config.json needs" in only_wrong(verdicts(qalign=copy / "qalign")).detail
