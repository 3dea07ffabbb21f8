"""A disk that forgets what was never synced, for tests of power cuts.

What a file system may lose: the bytes of files since their last `fsync`, page by page, and the changes of folders
(new names, renames, removals) since a folder was last synced, from some change on. Of the lost pages the file keeps
zeros.
"""

from __future__ import annotations

import os
import random
import shutil
import stat
from pathlib import Path

PAGE = 4096


class ForgetfulDisk:
    """What is durable under a folder. `fsync` takes the place of os.fsync and os.fdatasync."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.durable: dict[int, bytes] = {}  # by inode
        self.held: dict[int, int] = {}  # descriptors: an inode that is open is not given to another file
        self.trees = [self._tree()]

    def _tree(self) -> dict[str, int]:
        """The inode of each file, and 0 for each folder, by its path."""
        found = {}
        for path in sorted(self.root.rglob("*")):
            try:
                state = path.lstat()
            except FileNotFoundError:  # a thread has removed it
                continue
            found[path.relative_to(self.root).as_posix()] = 0 if stat.S_ISDIR(state.st_mode) else state.st_ino
            if found[path.relative_to(self.root).as_posix()] and state.st_ino not in self.held:
                self.held[state.st_ino] = os.open(path, os.O_RDONLY)
        return found

    def changed(self) -> None:
        """Remember the names: a power cut may keep any state since the last sync of a folder."""
        tree = self._tree()
        if tree != self.trees[-1]:
            self.trees.append(tree)

    def fsync(self, descriptor: int) -> None:
        state = os.fstat(descriptor)
        if stat.S_ISDIR(state.st_mode):
            self.trees = [self._tree()]
        else:
            self.durable[state.st_ino] = self._read(descriptor)

    def _read(self, descriptor: int) -> bytes:
        return Path(f"/proc/self/fd/{descriptor}").read_bytes()  # opened again: the position of the other stays

    def cut(self, seed: int) -> None:
        """Lose what is not durable, or a part of it."""
        draw = random.Random(seed)
        self.changed()
        kept = draw.choice([0.0, 0.0, 0.5, 1.0])
        tree = self.trees[0 if kept == 0 else draw.randrange(len(self.trees))]
        contents = {path: self._left(inode, kept, draw) for path, inode in tree.items() if inode}
        for path in self.root.iterdir():
            shutil.rmtree(path)
        for path, inode in tree.items():
            target = self.root / path
            if inode:
                target.write_bytes(contents[path])
            else:
                target.mkdir(parents=True, exist_ok=True)

    def _left(self, inode: int, kept: float, draw: random.Random) -> bytes:
        """The pages of a file: each as it was synced, or with probability `kept` as it was written last."""
        durable, written = self.durable.get(inode, b""), self._read(self.held[inode])
        pages = []
        for at in range(0, max(len(durable), len(written)), PAGE):
            page = written[at : at + PAGE] if draw.random() < kept else durable[at : at + PAGE]
            pages.append(page.ljust(min(PAGE, len(written) - at), b"\0"))
        return b"".join(pages)
