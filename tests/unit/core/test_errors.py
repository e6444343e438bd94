"""How commands end."""

import errno
import os
import runpy
import subprocess
import sys

import pytest

from ubgen.cli import quickstart
from ubgen.core.errors import UserError, run


def fail_with(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UserError("--steps must be positive"), 2, "error: --steps must be positive\n"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 2, "error: /x: Permission denied\n"),
        (
            OSError(errno.ENOSPC, "No space left on device", "/x"),
            2,
            "error: the disk is full (/x); free some",
        ),
        (
            RuntimeError("I/O error: No space left on device (os error 28)"),
            2,
            "error: the disk is full; free",
        ),
        (KeyboardInterrupt(), 130, "error: interrupted; run the same command again to continue\n"),
    ],
)
def test_a_failure_is_one_line_and_a_status(capsys, error, status, line):
    with pytest.raises(SystemExit) as caught:
        run(fail_with(error))
    assert caught.value.code == status
    message = capsys.readouterr().err
    assert message.startswith(line)
    assert message.count("\n") == 1


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device", "/x")]
)
def test_only_what_continues_is_told_to_run_again(capsys, error):
    for resumes, told in ((True, True), (False, False)):
        with pytest.raises(SystemExit):
            run(fail_with(error), resumes=resumes)
        assert ("run the same command again to continue" in capsys.readouterr().err) == told


def test_what_was_to_overwrite_continues_without(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["ubgen-train", "--out", "x", "--overwrite"])
    with pytest.raises(SystemExit):
        run(fail_with(KeyboardInterrupt()))
    line = "error: interrupted; run the same command again without --overwrite to continue\n"
    assert capsys.readouterr().err == line


@pytest.mark.parametrize(
    ("command", "continues"),
    [
        (["ubgen.cli.train"], True),
        (["ubgen.cli.export"], True),
        (["ubgen.cli.synth"], True),
        (["ubgen.cli.quickstart"], True),
        (["ubgen.cli.dataset", "convert"], True),
        (["ubgen.cli.dataset", "verify"], False),
        (["ubgen.cli.doctor"], False),
        (["ubgen.cli.report", "runs"], False),
        (["ubgen.cli.bench", "engine"], False),
        (["ubgen.miniature.measure"], False),
        (["ubgen.miniature.build"], True),
    ],
)
def test_every_command_knows_whether_it_continues(command, continues, capsys, monkeypatch):
    """As `python -m` runs it, interrupted while it reads its command line."""
    monkeypatch.setattr("sys.argv", command)
    monkeypatch.setattr("tyro.cli", interrupted)
    monkeypatch.setattr("tyro.extras.subcommand_cli_from_dict", interrupted)
    monkeypatch.delitem(sys.modules, command[0], raising=False)
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(command[0], run_name="__main__")
    assert ended.value.code == 130
    assert ("same command again" in capsys.readouterr().err) == continues


def interrupted(*_, **__):
    raise KeyboardInterrupt


@pytest.mark.parametrize("name", ["train", "export", "synth", "dataset", "report", "doctor", "bench"])
def test_every_command_runs_as_a_module_and_knows_its_name(name, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/somewhere/else.py", "--help"])
    monkeypatch.delitem(sys.modules, f"ubgen.cli.{name}", raising=False)
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(f"ubgen.cli.{name}", run_name="__main__")
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: ubgen-{name} ")


@pytest.mark.parametrize(
    ("option", "value"), [("updates", "0"), ("updates", "-3"), ("per-class", "-1"), ("per-class", "0")]
)
def test_quickstart_checks_its_numbers_first(option, value, capsys, monkeypatch, tmp_path):
    out = tmp_path / "quickstart"
    monkeypatch.setattr("sys.argv", ["quickstart", f"--{option}", value, "--out", str(out)])
    with pytest.raises(SystemExit) as ended:
        quickstart.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"error: --{option} must be at least 1, not {value}\n"
    assert not out.exists()


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run(lambda: 1 / 0)


def test_success_returns():
    done = []
    run(lambda: done.append(1))
    assert done == [1]


@pytest.mark.parametrize(
    ("encoding", "command"), [("ascii", ["doctor"]), ("cp1252", ["export", "--list-specs"])]
)
def test_a_terminal_that_is_not_utf8_gets_its_text_all_the_same(encoding, command):
    name, *options = command
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "COLUMNS": "100"}
    done = subprocess.run(
        [sys.executable, "-m", f"ubgen.cli.{name}", *options],
        env=environment,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-500:]
    assert len(done.stdout.decode(encoding)) > 300


def test_a_home_directory_after_an_equals_sign_is_expanded(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(
        "sys.argv", ["ubgen-x", "--out=~/runs", "--networks.clip=~/clip", "--prompt=a ~ b", "--a=~b"]
    )
    run(lambda: None)
    assert sys.argv[1:3] == [f"--out={tmp_path}/runs", f"--networks.clip={tmp_path}/clip"]
    assert sys.argv[3:] == ["--prompt=a ~ b", "--a=~b"]


def test_our_warnings_are_one_line():
    program = "from ubgen.core.errors import run, warn; run(lambda: warn('the prompt is cut'))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr == "warning: the prompt is cut\n"
