"""Shared by the command-line tools: the parser, and errors as one sentence on standard error."""

import argparse
import sys
from collections.abc import Callable

DEVICE_HELP = "cpu, cuda, cuda:1 (default: the GPU if there is one)"
PATHS_HELP = "pictures, folders or patterns such as 'a/*.jpg'; key=value overrides a setting of the recipe"


def make_parser(description: str) -> argparse.ArgumentParser:
    """A parser that shows the description as it is written."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def exit_status(
    call: Callable[[argparse.Namespace], int | None], args: argparse.Namespace, failed: int = 1
) -> int:
    """Run call(args) and return the exit status: its result, 0 for None, `failed` after an error.

    An error that the user can mend is printed as one sentence; any other exception passes through.
    """
    try:
        return call(args) or 0
    except (ValueError, OSError, TypeError, ImportError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return failed


def report_skipped(messages: list[str]) -> int:
    """Print what could not be read to standard error. Returns the exit status: 1 if there was any, else 0."""
    for message in messages:
        print(f"skipped: {message}", file=sys.stderr)
    return 1 if messages else 0
