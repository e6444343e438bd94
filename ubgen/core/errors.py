"""The one exception that is meant for the user, and how every program of ours ends: one clear line, a status."""

import errno
import io
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_USER_ERROR = 2
_INTERRUPTED = 130


class UserError(Exception):
    """A wrong input. The message is one line that names the file or option and says what would be right."""


def first_line(error: BaseException) -> str:
    """Of a library's error, whose message may be pages long or empty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def is_out_of_memory(error: BaseException) -> bool:
    """Of the host or of a GPU. PyTorch's allocator on the host, and DALI, tell it by the text of a RuntimeError."""
    texts = ("out of memory", "can't allocate memory", "not enough memory", "cudaErrorMemoryAllocation")
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in texts)


@contextmanager
def memory_errors(advice: str) -> Iterator[None]:
    """Out of memory, on the GPU or on the host, is a UserError that ends with `advice`: the options that help."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if not is_out_of_memory(error):
            raise
        raise UserError(f"out of memory ({first_line(error)}); {advice}") from error


class Warned(UserWarning):
    """Something that is probably not what the user wants, although it can be done; `run` prints it as one line."""


def warn(message: str) -> None:
    """Tell the user, once for each message of a process."""
    warnings.warn(message, Warned, stacklevel=3)


def _one_line_warnings() -> None:
    default = warnings.formatwarning

    def formatted(message: Warning | str, category: type[Warning], *place: object, **more: object) -> str:
        if issubclass(category, Warned):
            return f"warning: {message}\n"
        return default(message, category, *place, **more)  # type: ignore[arg-type]  # passed on as it came

    warnings.formatwarning = formatted


def install_extra(name: str) -> str:
    """The command that installs an optional group of packages, for messages; to be run in the checkout."""
    return f"pip install -c constraints.txt -e '.[{name}]'"


def run(main: Callable[[], object], *, resumes: bool = True) -> None:
    """Call `main`; a wrong input, a failing disk or Ctrl-C ends the process with one line instead of a traceback.

    Exit status 2 for a UserError or an operating-system error (full disk, no permission), 130 when interrupted.
    Anything else is a bug in ubgen and keeps its traceback. `resumes`: the same command, run again, goes on where
    this one stopped, and the line says so.
    """
    again = _again() if resumes else ""
    _prepare_terminal()
    try:
        main()
    except UserError as error:
        _stop(str(error), _USER_ERROR)
    except KeyboardInterrupt:
        _stop(f"interrupted{again and f'; {again}'}", _INTERRUPTED)
    except BrokenPipeError:
        raise SystemExit(_USER_ERROR) from None  # the reader of our output left; there is nobody to tell
    except OSError as error:
        _stop(_describe(error, again), _USER_ERROR)
    except Exception as error:
        if not _is_full_disk(error):
            raise
        _stop(_full_disk("", again), _USER_ERROR)


def _prepare_terminal() -> None:
    """What every command needs of the process: characters that the terminal lacks, warnings, `--out=~/x`."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # of another encoding than UTF-8, such as cp1252 or ASCII
    _one_line_warnings()
    # the shell expands "--out ~/x" only
    sys.argv[1:] = [re.sub(r"^(--[\w.-]+=)(~[^=]*)$", _expanded, argument) for argument in sys.argv[1:]]


def _expanded(option: re.Match[str]) -> str:
    return option[1] + os.path.expanduser(option[2])


def _again() -> str:
    """With --overwrite the same command would start over."""
    change = " without --overwrite" if "--overwrite" in sys.argv else ""
    return f"run the same command again{change} to continue"


def _stop(message: str, status: int) -> None:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(status)


def _describe(error: OSError, again: str) -> str:
    if error.errno == errno.ENOSPC:
        return _full_disk(f" ({error.filename})" if error.filename else "", again)
    return f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)


def _full_disk(where: str, again: str) -> str:
    return f"the disk is full{where}; free some space{again and f' and {again}'}"


def _is_full_disk(error: Exception) -> bool:
    """safetensors and torch.save report a failed write as errors of their own, told apart by the text alone."""
    signs = ("No space left on device", "os error 28", "PytorchStreamWriter failed writing file")
    return any(sign in str(error) for sign in signs)
