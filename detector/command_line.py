"""What the tools have in common: their parser, and errors as one sentence on standard error."""

import argparse
import sys
from collections.abc import Callable

DEVICE_HELP = "cpu, cuda, cuda:1 (default: the GPU where there is one)"
PATHS_HELP = "pictures, folders, or patterns such as 'a/*.jpg'; also key=value, a setting of the recipe"


def make_parser(description: str) -> argparse.ArgumentParser:
    """A parser that shows the description as it is written."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def exit_status(call: Callable[[argparse.Namespace], int | None], args: argparse.Namespace) -> int:
    """What call(args) gives, None as 0; 1 where it raises an error for people, which is printed."""
    try:
        return call(args) or 0
    except (ValueError, OSError, TypeError, ImportError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def report_skipped(messages: list[str]) -> int:
    """Name what could not be read on standard error; gives the exit status, 1 where there was any."""
    for message in messages:
        print(f"skipped: {message}", file=sys.stderr)
    return 1 if messages else 0
