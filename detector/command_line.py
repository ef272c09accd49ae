"""Shared by the command-line tools: the parser, and errors as one sentence on standard error."""

import argparse
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from typing import IO, Any

from .names import CONTROL, escaped
from .processes import is_lost, joined
from .stop import sigterm_as_ctrl_c

DEVICE_HELP = "cpu, cuda, cuda:1 (default: the GPU if there is one)"
PATHS_HELP = "pictures, folders or patterns such as 'a/*.jpg'; key=value overrides a setting of the recipe"

# Kept: tab, line feed, a leading return (of a bar).
_UNSAFE = rf"(?!\A\r|[\t\n]){CONTROL}"


class SafeStream:
    """A text stream that shows what could move the cursor or cannot be encoded as escapes, such as \\x1b.

    Names of files and classes come from strangers, and reach the terminal in many sentences and tables.
    """

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        safe = escaped(text, _UNSAFE)
        encoding = self._stream.encoding or "utf-8"
        self._stream.write(safe.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def make_parser(description: str) -> argparse.ArgumentParser:
    """A parser that shows the description as it is written."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def exit_status(
    call: Callable[[argparse.Namespace], int | None], args: argparse.Namespace, failed: int = 1
) -> int:
    """Run call(args) and return the exit status: its result, 0 for None, `failed` after an error, 130 after Ctrl-C or SIGTERM.

    An error that the user can mend is printed as one sentence; any other exception passes through. Processes of torchrun
    are joined for the call, and print a sentence once.
    """
    with (
        redirect_stdout(SafeStream(sys.stdout)),
        redirect_stderr(SafeStream(sys.stderr)),
        joined() as peers,
        sigterm_as_ctrl_c(),
    ):
        try:
            status = call(args) or 0
            peers.wait()
            return status
        except KeyboardInterrupt as stop:
            failed, message = 130, str(stop) or "stopped"
        except (ValueError, OSError, TypeError, ImportError, FloatingPointError) as error:
            message = f"error: {error}"
        except RuntimeError as error:
            if not is_lost(error):
                raise
            message = "error: another process of this run ended; its own message says why"
        if peers.fail(message):
            print(message, file=sys.stderr, flush=True)
        return failed


def report_skipped(messages: list[str]) -> int:
    """Print what could not be read to standard error. Returns the exit status: 1 if there was any, else 0."""
    for message in messages:
        print("skipped:", escaped(message), file=sys.stderr)
    return 1 if messages else 0
