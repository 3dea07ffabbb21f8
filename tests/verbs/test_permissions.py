"""The permissions of everything that is written. Oracle: those of a file and a folder that the test makes itself."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import loftq


@contextmanager
def under(umask: int) -> Iterator[set[str]]:
    """Run with a umask. Yields the permissions that files and folders then have."""
    before = os.umask(umask)
    try:
        yield {f"file {0o666 & ~umask:o}", f"folder {0o777 & ~umask:o}"}
    finally:
        os.umask(before)


def modes(folder: Path) -> dict[str, str]:
    """The permissions of all files and folders, each with the name of one that has them."""
    return {
        f"{'folder' if path.is_dir() else 'file'} {stat.S_IMODE(path.stat().st_mode):o}": str(path)
        for path in folder.rglob("*")
    }


def test_a_folder_for_its_owner_only(pico: Path, tmp_path: Path) -> None:
    with under(0o077) as expected:
        loftq.quantize(str(pico), rank=4, iters=1, output=tmp_path / "out" / "artifact", quiet=True)
    assert set(modes(tmp_path)) == expected, modes(tmp_path)


def test_outputs_for_a_group(pico: Path, tmp_path: Path) -> None:
    """Every kind of output, also what safetensors, peft and transformers write: they have permissions of their own."""
    data = tmp_path / "sums.jsonl"
    data.write_text('{"prompt": "1+1?", "response": "2"}\n' * 8)
    outputs = tmp_path / "outputs"
    with under(0o002) as expected:
        outputs.mkdir()
        artifact = loftq.quantize(str(pico), rank=4, iters=1, quiet=True, output=outputs / "artifact").folder
        loftq.merge(artifact, to="bf16", output=outputs / "merged", check=False, quiet=True)
        loftq.report([artifact], html=outputs / "page.html")
        settings = {"max_steps": 2, "batch_size": 2, "save_steps": 1, "quiet": True, "dtype": "float32"}
        loftq.train(str(artifact), data=str(data), output=outputs / "trained", **settings)
    assert list((outputs / "trained").glob("checkpoint-*/*.safetensors"))
    assert set(modes(outputs)) == expected, modes(outputs)
