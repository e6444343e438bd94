"""ubgen-dataset as the user calls it: what it prints, its exit status, and that no name reaches the terminal raw."""

import errno
import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ubgen.cli import dataset as command
from ubgen.dataset import ShardWriter, encode_image

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Exit status, standard output and standard error of `ubgen-dataset ARGUMENTS`."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ubgen-dataset", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        status = 0
        try:
            command.main()
        except SystemExit as stop:
            status = int(stop.code or 0)
        out, error = capsys.readouterr()
        return status, out, error

    return run


def test_verify_repair(jpegs: Path, tmp_path: Path, run: Run) -> None:
    status, out, error = run("verify", jpegs)
    assert (status, error.strip()) == (0, "")
    assert "24 (all decoded)" in out
    damaged = Path(shutil.copytree(jpegs, tmp_path / "d"))
    tar = damaged / "shard-000001.tar"
    tar.write_bytes(tar.read_bytes()[:-1] + b"x")
    status, out, error = run("verify", damaged, "--no-decode")
    assert status == 1
    assert "shard-000001: " in out
    assert (
        error.strip()
        .splitlines()[-1]
        .startswith(f"error: {damaged}: shard 1 is damaged; the same ubgen-synth command")
    )
    assert run("verify", damaged, "--repair")[0] == 1
    assert not (damaged / "manifest.json").exists()
    assert not (damaged / "shard-000001.json").exists()
    assert (damaged / "shard-000000.json").exists()
    assert run("verify", damaged)[0] == 0  # what is left is whole


def test_stats(jpegs: Path, tmp_path: Path, run: Run) -> None:
    status, out, _ = run("stats", jpegs, "--out", tmp_path / "new" / "stats")
    assert status == 0
    assert "4, with 6 to 6 images" in out
    stats = json.loads((tmp_path / "new" / "stats" / "stats.json").read_text())
    assert (stats["images"], stats["flagged"]) == (24, 1)
    assert {"contact-sheet.png", "contact-sheets", "scores.png"} <= {
        p.name for p in (tmp_path / "new" / "stats").iterdir()
    }


@pytest.mark.parametrize(("asked", "drawn"), [("2", 2), ("0", 0), ("all", 4)])
def test_stats_draws_as_many_sheets_as_asked(
    jpegs: Path, tmp_path: Path, run: Run, asked: str, drawn: int
) -> None:
    assert run("stats", jpegs, "--out", tmp_path, "--sheets", asked)[0] == 0
    assert len(list((tmp_path / "contact-sheets").iterdir())) == drawn


def test_diff(jpegs: Path, datasets_by_extension: Callable[[str], Path], tmp_path: Path, run: Run) -> None:
    assert run("diff", jpegs, jpegs)[0] == 0
    pngs = datasets_by_extension("png")
    status, _, error = run("diff", jpegs, pngs)
    assert (status, error.strip().splitlines()[-1]) == (1, f"error: {jpegs} and {pngs} differ")
    # images of one colour survive JPEG to a grey level
    figures = tmp_path / "figures.json"
    status, out, _ = run("diff", jpegs, pngs, "--tolerance-levels", 1, "--share", 0.999, "--out", figures)
    assert status == 0
    assert "the same within the tolerance" in out
    assert json.loads(figures.read_text())["agrees"] is True


def test_convert(jpegs: Path, tmp_path: Path, run: Run) -> None:
    status, out, _ = run("convert", jpegs, tmp_path / "out", "--to", "webdataset", "--shard-size", 5)
    assert (status, out.strip()) == (0, f"24 images in {tmp_path / 'out'}")
    assert run("verify", tmp_path / "out")[0] == 0
    status, out, _ = run("convert", jpegs, tmp_path / "out", "--to", "webdataset", "--shard-size", 5)
    assert (status, out.strip()) == (0, f"{tmp_path / 'out'} is finished, with 24 images; nothing was done")
    status, _, error = run("convert", jpegs, tmp_path / "out", "--to", "parquet", "--shard-size", 5)
    held = f"{tmp_path / 'out'} holds a finished run with another configuration"
    assert (status, error.strip()) == (
        2,
        f"error: {held} (to was 'webdataset', now 'parquet'); choose another OUT",
    )


@pytest.mark.parametrize(
    ("wrong", "start"),
    [
        ("verify D --workers -1", "--workers must be at least 1, not -1"),
        ("verify D --workers 0", "--workers must be at least 1, not 0"),
        ("stats D --sheets -1", "--sheets must be at least 0, or all, not -1"),
        ("diff D D --share 2", "--share must lie in 0..1, such as 0.999, not 2"),
        ("diff D D --share nan", "--share must lie in 0..1"),
        ("diff D D --tolerance-levels -1", "--tolerance-levels must lie in 0..255, not -1"),
        ("diff D D --tolerance-levels 256", "--tolerance-levels must lie in 0..255"),
    ],
)
def test_wrong_options_are_one_line(jpegs: Path, run: Run, wrong: str, start: str) -> None:
    status, out, error = run(*(jpegs if word == "D" else word for word in wrong.split()))
    assert (status, out) == (2, "")
    (line,) = error.splitlines()
    assert line.startswith(f"error: {start}")


def replace(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def leave(path: Path, kind: str) -> None:
    """Nothing but an empty directory, or a file, where the dataset was."""
    shutil.rmtree(path)
    path.mkdir() if kind == "directory" else path.write_bytes(b"")


NO_LIST = r'classes.json is not a list of classes in the order of their indices: [{"index": 0,'
NO_DATASETS: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "an empty directory": (
        lambda d: leave(d, "directory"),
        ("classes.json is missing", "holds no finished shard", "holds no .tar file"),
    ),
    "a file": (lambda d: leave(d, "file"), ("D: not a directory",)),
    "nothing": (lambda d: shutil.rmtree(d), ("D: no such directory",)),
    "another stage": (
        lambda d: replace(d / "manifest.json", lambda m: m.update(stage="export")),
        ("D is a ubgen export directory; expected a ubgen synth or convert directory",),
    ),
    "no stage": (
        lambda d: replace(d / "manifest.json", lambda m: m.update(stage=["synth"])),
        ("is not a ubgen manifest",),
    ),
    "a manifest without figures": (
        lambda d: replace(d / "manifest.json", lambda m: m.update(dataset=None, config=[])),
        ("does not say how many shards",),
    ),
    "a manifest of too many": (
        lambda d: replace(d / "manifest.json", lambda m: m.update(dataset={"shards": 10**30})),
        ("does not say how many shards",),
    ),
    "a deep manifest": (lambda d: (d / "manifest.json").write_text("[" * 10**5), ("is not valid JSON",)),
    "a table of classes": (lambda d: (d / "classes.json").write_text('{"0": "cat"}'), (NO_LIST,)),
    "names alone": (lambda d: (d / "classes.json").write_text('["cat", "dog"]'), (NO_LIST,)),
    "a deep list of classes": (lambda d: (d / "classes.json").write_text("[" * 10**5), (NO_LIST,)),
}


@pytest.mark.parametrize("kind", NO_DATASETS)
def test_what_is_no_dataset_is_refused_in_one_line(jpegs: Path, tmp_path: Path, run: Run, kind: str) -> None:
    place = Path(shutil.copytree(jpegs, tmp_path / "D"))
    change, messages = NO_DATASETS[kind]
    change(place)
    for arguments in (
        ("verify", place),
        ("stats", place),
        ("diff", jpegs, place),
        ("convert", place, tmp_path / "out", "--to", "folder"),
    ):
        status, _, error = run(*arguments)
        (line,) = error.strip().splitlines()
        assert (status, line.startswith("error: ")) == (2, True)
        assert any(message in line for message in messages)


def test_a_run_of_another_form_is_read_as_none(jpegs: Path, tmp_path: Path, run: Run) -> None:
    place = Path(shutil.copytree(jpegs, tmp_path / "D"))
    replace(place / "run.json", lambda content: content.update(identity=None))
    assert run("verify", place)[0] == 0
    assert run("diff", jpegs, place)[0] == 0


@pytest.mark.parametrize("content", [b"", b"GIF89a", "large"])
def test_an_image_that_cannot_be_read_is_named(
    jpegs: Path, tmp_path: Path, run: Run, content: bytes | str
) -> None:
    if content == "large":
        buffer = io.BytesIO()
        Image.new("1", (20000, 20000)).save(buffer, "PNG")
        content = buffer.getvalue()
    place = Path(shutil.copytree(jpegs, tmp_path / "D"))
    with ShardWriter(place, 1) as writer:
        for position in range(8, 16):
            writer.write(
                position, content if position == 9 else encode_image(Image.new("RGB", (16, 16)), "jpg"), 0, {}
            )
    status, _, error = run("diff", jpegs, place)
    assert (status, "shard-000001.tar: sample 000000009" in error.splitlines()[-1]) == (2, True)
    status, _, error = run("stats", place, "--out", tmp_path / "stats")
    assert (status, f"{place}: image 9 " in error.splitlines()[-1]) == (2, True)


def test_a_shard_that_may_not_be_read_is_not_damaged(
    jpegs: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be deleted by --repair. The administrator may read all files: so the system's answer is put in here."""
    place = Path(shutil.copytree(jpegs, tmp_path / "D"))
    real = Path.open

    def refuse(path: Path, *args: Any, **options: Any) -> Any:
        if path.name == "shard-000001.tar":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, *args, **options)

    monkeypatch.setattr(Path, "open", refuse)
    status, _, error = run("verify", place, "--repair")
    assert (status, error.strip()) == (2, f"error: {place / 'shard-000001.tar'}: Permission denied")
    assert (place / "shard-000001.json").exists()


def test_figures_of_a_comparison_need_a_place(jpegs: Path, tmp_path: Path, run: Run) -> None:
    for out in (tmp_path, tmp_path / "none" / "figures.json"):
        status, _, error = run("diff", jpegs, jpegs, "--out", out)
        assert (status, error.strip()) == (
            2,
            f"error: --out {out}: expected a file to write, in a directory that exists",
        )


def test_wrong_inputs_are_one_line(jpegs: Path, tmp_path: Path, run: Run) -> None:
    (tmp_path / "file").write_bytes(b"")
    for arguments in (
        ("convert", jpegs, tmp_path / "file", "--to", "folder"),
        ("convert", jpegs, "", "--to", "folder"),
        ("convert", "", tmp_path / "out", "--to", "folder"),
        ("verify", tmp_path / "none"),
        ("stats", tmp_path / "none"),
        ("diff", tmp_path / "none", tmp_path),
        ("convert", tmp_path / "none", tmp_path / "out", "--to", "folder"),
        ("verify", "nosuch://x/y"),
    ):
        status, _, error = run(*arguments)
        assert status == 2
        lines = error.strip().splitlines()
        assert len(lines) == 1
        assert lines[0].startswith("error: ")
