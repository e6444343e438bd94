"""What ubgen-export shows without building anything."""

import re

import pytest

from ubgen.cli import export
from ubgen.core.config import shipped_engine_specs
from ubgen.export import load_spec, machine_problem


@pytest.fixture
def shown(capsys, monkeypatch):
    """shown(*arguments): what the command prints."""

    def call(*arguments):
        monkeypatch.setattr("sys.argv", ["ubgen-export", *map(str, arguments)])
        export.main()
        return capsys.readouterr().out

    return call


def test_every_shipped_spec_is_listed_with_what_is_missing(shown):
    lines = shown("--list-specs").splitlines()
    heads = [line.partition(":")[0] for line in lines if not line.startswith(" ")]
    assert heads == sorted(shipped_engine_specs())
    assert len(lines) == 4 * len(heads)
    for name, row in zip(heads, range(0, len(lines), 4), strict=True):
        spec = load_spec(name)
        reason = machine_problem(spec)
        assert f" on {spec.device}, " in lines[row + 1]
        assert lines[row + 1].endswith(f" {spec.image_size} px")
        unet = spec.networks.unet
        assert f"unet {unet.batch.min}..{unet.batch.max} ({unet.batch.best})" in lines[row + 2]
        wanted = f"    not on this machine: {reason}" if reason else "    this machine can build it"
        assert lines[row + 3] == wanted


def test_a_dry_run_shows_every_network_and_writes_nothing(shown, tmp_path):
    text = shown("--spec", "miniature", "--out", tmp_path / "engine", "--dry-run")
    names = [name for name, _ in load_spec("miniature").networks.items()]
    assert re.findall(r"^(\w+): onnxruntime, float32, to build$", text, re.MULTILINE) == names
    assert len(re.findall(r"[\d.]+ M parameters, [\d.]+ MiB; for each row [\d.]+ GFLOP", text)) == len(names)
    assert "    latents: " in text
    assert "    -> noise: " in text
    assert "    unet.onnx (weights inside)" in text
    sizes = [float(size) for size in re.findall(r"M parameters, ([\d.]+) MiB", text)]
    total = float(re.search(r"^all weights: ([\d.]+) MiB; beside the engines: ", text, re.MULTILINE)[1])
    assert total == pytest.approx(sum(sizes), abs=0.05 * (len(sizes) + 1))
    assert "nothing would be done" not in text
    assert not (tmp_path / "engine").exists()


def test_a_dry_run_says_why_the_export_would_be_refused(shown, tmp_path):
    spec = tmp_path / "large.toml"
    unet = "[networks.unet]\nbatch = { max = 1000000000 }\n"
    spec.write_text(f'extends = "miniature"\n{unet}', encoding="utf-8")
    assert "would be refused: networks.unet at batch.max = 1000000000 takes " in shown(
        "--spec", spec, "--dry-run"
    )


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "--spec: name an engine spec"),
        (["--spec", "miniature"], "--out: name the directory of the engine"),
        (["--spec", "nothing"], "engine spec 'nothing' is neither"),
    ],
)
def test_what_is_not_given_is_named(shown, capsys, arguments, line):
    with pytest.raises(SystemExit) as ended:
        shown(*arguments)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {line}")
    assert error.count("\n") == 1
