"""Ctrl-C, SIGTERM and SIGHUP, as a flag that long work looks at."""

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType

from . import processes

_HEARD = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop, and has saved the state that it resumes from."""


@contextlib.contextmanager
def sigterm_as_ctrl_c() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt, unless it is ignored or handled already."""
    before = signal.getsignal(signal.SIGTERM)
    if before is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class StopSignal:
    """A context whose `asked` becomes True at Ctrl-C, SIGTERM or SIGHUP.

    A second Ctrl-C or SIGTERM raises KeyboardInterrupt. A closing terminal may send SIGHUP twice, and torchrun passes on
    what its processes heard already, so there a second one does nothing. A signal that was ignored before, as in a
    background job or under nohup, stays ignored.
    """

    def __init__(self) -> None:
        self.asked = False
        self._raises = False

    def __enter__(self) -> "StopSignal":
        heard = [n for n in _HEARD if signal.getsignal(n) is not signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._note) for number in heard}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def is_agreed(self) -> bool:
        """Whether any process was asked to stop. All processes call this at the same place."""
        return processes.any_of(self.asked)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Work that may be lost: a first signal during it raises Interrupted."""
        self._raises = not self.asked
        try:
            yield
        finally:
            self._raises = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            if number != getattr(signal, "SIGHUP", None) and processes.world_size() == 1:
                raise KeyboardInterrupt
            return
        self.asked = True
        if self._raises:
            raise Interrupted("stopped during the validation; continue with --resume, which repeats it")
        again = "; once more to stop at once" if processes.world_size() == 1 else ""
        _tell(f"\nstopping soon{again}")


def _tell(text: str) -> None:
    """Print from a signal's handler."""
    try:
        print(text, flush=True)
    except RuntimeError:  # the signal came in the middle of another print
        return
    except OSError:
        # The terminal is gone. Each later line would fail.
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.dup2(silent, 2)
        os.close(silent)
