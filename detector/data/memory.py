"""Refuse a file that would not fit into memory: the system kills a process that takes too much, without a word."""

import math
import re
from pathlib import Path


def available_memory() -> float:
    """The bytes that this process may still take, swap included; infinite where the system does not say."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:
        return math.inf
    found = re.findall(r"^(?:MemAvailable|SwapFree):\s+(\d+) kB", text, re.M)
    return sum(map(int, found)) * 1024 if found else math.inf


def check_memory(path: Path, needed: int) -> None:
    """Check that a file can be read that takes so many bytes of memory. ValueError: it cannot."""
    if needed > (available := available_memory()):
        raise ValueError(
            f"{path}: reading it takes about {needed / 2**30:.1f} GiB of memory, and {available / 2**30:.1f} GiB are "
            "free; divide the file, or read it on a larger machine"
        )
