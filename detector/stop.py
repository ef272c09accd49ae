"""Ctrl-C and SIGTERM, as a flag that long work looks at."""

import signal
from types import FrameType


class Interrupted(Exception):
    """The run was asked to stop, and has saved the state that it resumes from."""


class StopSignal:
    """A context whose `asked` becomes True at Ctrl-C or SIGTERM. A second signal raises KeyboardInterrupt.

    A signal that was ignored before, as in a background job, stays ignored.
    """

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> "StopSignal":
        heard = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) is not signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._note) for number in heard}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        print("\nstopping after this update; once more to stop at once", flush=True)
