"""A lock on a run's folder, which one process holds at a time."""

import os
import socket
from contextlib import AbstractContextManager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


class FolderLock(AbstractContextManager):
    """Keeps other processes out of a folder. The file `.lock` in it says who holds the lock.

    The system frees the lock when its process ends, however it ends, and workers do not inherit it. Nothing is locked
    on Windows, on a file system without locks, and between two runs of one process.

    ValueError: another process holds the lock.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> "FolderLock":
        self.folder.mkdir(parents=True, exist_ok=True)
        self._file = open(self.folder / ".lock", "a+", encoding="utf-8")
        try:
            if fcntl is not None:
                # flock would live on in the workers of a killed process.
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            self._file.seek(0)
            holder = self._file.read(200).strip() or "another process"
            self._file.close()
            raise ValueError(
                f"{self.folder} is in use by {holder}: wait for its end, or give another --output folder"
            ) from None
        except OSError:  # a file system without locks
            pass
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._file.flush()
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
