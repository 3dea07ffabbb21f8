"""Files that can run code: programs, scripts, libraries, and pickles, which run code when they are loaded."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

_SUFFIX = re.compile(
    r"\.(py|pyc|pyd|pyz|so(\.\d+)*|dll|dylib|exe|sh|bash|bat|cmd|ps1|jar|whl|egg"  # programs
    r"|bin|pt|pth|pkl|pickle|ckpt|joblib|dill|npy|npz|h5|keras)$",  # pickles, and what may hold them
    re.IGNORECASE,
)
_BEGINNINGS = (b"\x7fELF", b"#!", b"MZ", b"PK\x03\x04", *(bytes([0x80, protocol]) for protocol in range(2, 6)))
_TENSORS = (".safetensors", ".gguf")


def programs_below(folder: Path) -> Iterator[str]:
    """The names of the files in a folder and its subfolders that are programs or pickles. Links are not followed."""
    for above, folders, files in os.walk(folder):
        folders.sort()
        for name in sorted(files):
            path = Path(above, name)
            if is_program(path):
                yield path.relative_to(folder).as_posix()


def is_program(path: Path) -> bool:
    """Whether the suffix, the permissions or the first bytes of a regular file are those of a program or a pickle."""
    state = path.lstat()
    if not stat.S_ISREG(state.st_mode):
        return False
    if _SUFFIX.search(path.name) or state.st_mode & 0o111:
        return True
    if path.suffix in _TENSORS:  # a length may begin like anything
        return False
    try:
        with path.open("rb") as file:
            return file.read(4).startswith(_BEGINNINGS)
    except OSError:  # the comparison of hashes reports files that cannot be read
        return False
