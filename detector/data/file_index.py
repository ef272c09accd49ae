"""Find the files that annotations name below one folder, and nothing outside the data's root."""

import itertools
import os
import re
import unicodedata
from collections import Counter, defaultdict
from pathlib import Path
from urllib.parse import unquote

from .images import IMAGE_SUFFIXES, walk

_LONGEST_PATH = 4096


def key(path: str) -> str:
    """A path as it is compared: with any slashes, in any case, umlauts in either form of Unicode or as %C3%A9."""
    return _with_slashes(unquote(path)).removeprefix("./").casefold()


def picture_key(path: str | Path) -> str:
    """A picture's path as lists of pictures are compared."""
    return _with_slashes(os.path.abspath(path))


def _with_slashes(path: str) -> str:
    return unicodedata.normalize("NFC", path.replace("\\", "/"))


def stem(path: str) -> str:
    """The path without the suffix of a picture. Any other suffix stays, because names may hold dots."""
    base, suffix = os.path.splitext(path)
    return base if suffix.lower() in IMAGE_SUFFIXES else path


def is_picture(path: str) -> bool:
    """Whether a path has the suffix of a picture."""
    return stem(path) != path


class FileIndex:
    """The files below a folder, as `walk` finds them.

    folder, root: a file that an annotation names lies below one of the two.
    files: paths below `folder` with "/", sorted. passed_over: how many folders of outputs are not searched.
    """

    def __init__(self, folder: str | Path, root: str | Path | None = None) -> None:
        self.folder = Path(folder)
        self._roots = [os.path.abspath(place) for place in (folder, root) if place is not None]
        self.passed_over: Counter[str] = Counter()
        self.files = sorted(walk(self.folder, [], self.passed_over))
        # The names as they are come last, because two may differ in case alone.
        self._exact = {key(file): file for file in self.files} | {file: file for file in self.files}
        self._named: dict[str, list[str]] = defaultdict(list)
        for file in self.files:
            name = key(file).rpartition("/")[2]
            # A set, because a file without suffix is its own stem.
            for known in {name, stem(name)}:
                self._named[known].append(file)

    @property
    def pictures(self) -> list[str]:
        """The files that have a picture's suffix."""
        return [file for file in self.files if is_picture(file)]

    def exact(self, path: str) -> str | None:
        """The file of this path below the folder, or None."""
        return self._exact.get(path) or self._exact.get(key(os.path.normpath(key(path))))

    def named(self, path: str) -> list[str]:
        """The files with the last part of a path as their name or stem; else with another suffix or without a hash."""
        last = key(path).rpartition("/")[2]
        # Label Studio puts eight digits in front of a name.
        plain = re.sub(r"^[0-9a-f]{8}-", "", last)
        tried = (last, stem(last), plain, stem(plain))
        return next((self._named[name] for name in tried if name in self._named), [])

    def find(self, path: str, near: str | None = None) -> str | None:
        """The file that is meant by a path: the exact one, else the one whose folders agree best; None: unclear.

        near: the folder of the file that names the path. Of files whose folders agree equally, the nearest is meant.
        """
        if exact := (near and self.exact(f"{near}/{path}")) or self.exact(path):
            return exact
        candidates = self.named(path)
        if len(candidates) > 1:
            place = os.path.dirname(path) if near is None else near
            agreeing = [(*_agreement(file, path), shared_folders(file, place)) for file in candidates]
            best = max(agreeing)
            candidates = [f for f, agreed in zip(candidates, agreeing, strict=True) if agreed == best]
        in_one_folder = len({os.path.dirname(file) for file in candidates}) == 1
        return candidates[0] if in_one_folder else None

    def path_of(self, name: str, near: str | None = None) -> str:
        """The path of the file that is meant by a name; it may be absent. ValueError: the name leads out of the data.

        near: as in `find`.
        """
        if found := self.find(name, near):
            return os.path.join(self.folder, found)
        path = os.path.normpath(os.path.join(self.folder, name.replace("\\", "/")))
        if len(path) > _LONGEST_PATH or "\0" in path:
            raise ValueError(f"{path[:60]!r}... is no path of a file")
        if not any(f"{os.path.abspath(path)}/".startswith(f"{root.rstrip('/')}/") for root in self._roots):
            raise ValueError(
                f"the file {name!r} is outside {self._roots[-1]}; accepted are files below data.root"
            )
        return path

    def picture_of(self, file: Path, name: str | None) -> str:
        """The path of the picture that an annotation file is about. It may be absent.

        It is the one with the file's own stem, or else the one that the file names, which often is an old name.
        """
        if found := self.find(file.with_suffix("").as_posix()):
            return os.path.join(self.folder, found)
        return self.path_of(name or f"{file.stem}.jpg", file.parent.as_posix())


def shared_folders(path: str, other: str) -> int:
    """How many folders two paths share, counted from the root."""
    pairs = zip(key(path).split("/"), key(other).split("/"), strict=False)
    return len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))


def _agreement(file: str, path: str) -> tuple[int, bool]:
    """How many folders of two paths agree, counted from the file upwards, and whether `path` has no others."""
    ours, wanted = (key(each).split("/")[-2::-1] for each in (file, path))
    agreed = 0
    while agreed < min(len(ours), len(wanted)) and ours[agreed] == wanted[agreed]:
        agreed += 1
    return agreed, agreed == len(ours)
