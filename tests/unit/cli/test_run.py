"""How commands end."""

import errno

import pytest

from ubgen.cli._run import run
from ubgen.errors import UserError


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


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run(lambda: 1 / 0)


def test_success_returns():
    done = []
    run(lambda: done.append(1))
    assert done == [1]
