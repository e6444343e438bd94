"""How every command ends: one clear line on stderr and an exit status."""

import errno
import sys
from collections.abc import Callable

from ubgen.errors import UserError

_USER_ERROR = 2
_INTERRUPTED = 130


def run(main: Callable[[], object]) -> None:
    """Call `main`; a wrong input, a failing disk or Ctrl-C ends the process with one line instead of a traceback.

    Exit status 2 for a UserError or an operating-system error (full disk, no permission), 130 when interrupted.
    Anything else is a bug in ubgen and keeps its traceback.
    """
    try:
        main()
    except UserError as error:
        _stop(str(error), _USER_ERROR)
    except KeyboardInterrupt:
        _stop("interrupted; run the same command again to continue", _INTERRUPTED)
    except BrokenPipeError:
        raise SystemExit(_USER_ERROR) from None  # the reader of our output left; there is nobody to tell
    except OSError as error:
        _stop(_describe(error), _USER_ERROR)
    except Exception as error:
        if not _is_full_disk(error):
            raise
        _stop("the disk is full; free some space and run the same command again to continue", _USER_ERROR)


def _stop(message: str, status: int) -> None:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(status)


def _describe(error: OSError) -> str:
    if error.errno == errno.ENOSPC:
        where = f" ({error.filename})" if error.filename else ""
        return f"the disk is full{where}; free some space and run the same command again to continue"
    return f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)


def _is_full_disk(error: Exception) -> bool:
    """safetensors and torch.save report a failed write as errors of their own, told apart by the text alone."""
    signs = ("No space left on device", "os error 28", "PytorchStreamWriter failed writing file")
    return any(sign in str(error) for sign in signs)
