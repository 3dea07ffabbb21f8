"""Whether the files of a folder hold the bytes that were written into them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from loftq.errors import OutputError
from loftq.formats.artifact import CARD
from loftq.formats.checkpoint import Shard
from loftq.formats.scan import Scan, hash_of, scan
from loftq.formats.shard_writer import ShardWriter


class Description(NamedTuple):
    """Size and SHA-256 of every file by name, and the number of blocks of zeros of each tensor that has any."""

    files: dict[str, dict[str, Any]]
    zero_blocks: dict[str, int]


def describe(
    folder: Path,
    shards: Sequence[Shard],
    hashes: Mapping[str, str | None],
    records: Mapping[str, Mapping[str, Any]],
) -> Description:
    """Read all planned files of a partial folder once. Raises OutputError if one is not what was written.

    `hashes` are those of files that were written as a whole, `records` those of the steps that wrote tensors.
    """
    files: dict[str, dict[str, Any]] = {}
    zero_blocks: dict[str, int] = {}
    written = {name: digest for record in records.values() for name, digest in record.get("written", {}).items()}
    planned = {shard.file: shard for shard in shards}
    for name in sorted({*planned, *hashes}):
        path = folder / name
        try:
            contents = scan(path, _places(planned[name]) if name in planned else None)
        except FileNotFoundError as error:
            raise OutputError(_not_written(path, "it was removed")) from error
        expected = hashes.get(name)
        if expected is not None and contents.sha256 != expected:
            raise OutputError(_not_written(path, "SHA-256 mismatch"))
        if expected is None and name in planned:
            _check_shard(path, contents, planned[name], written)
        files[name] = {"bytes": contents.nbytes, "sha256": contents.sha256}
        zero_blocks |= contents.zero_blocks
    return Description(files, zero_blocks)


def is_written(writer: ShardWriter, record: Mapping[str, Any]) -> bool:
    """Whether a recorded step has hashes, and the tensors that it wrote still have them."""
    written = record.get("written")
    if not isinstance(written, dict) or not written:
        return False
    return all(writer.holds(name, sha256) for name, sha256 in written.items())


def _places(shard: Shard) -> dict[str, tuple[int, int]]:
    return {name: (start, start + spec.nbytes) for name, (start, spec) in shard.offsets.items()}


def _check_shard(path: Path, contents: Scan, shard: Shard, written: Mapping[str, str]) -> None:
    if contents.nbytes != shard.nbytes:
        raise OutputError(_not_written(path, f"it has {contents.nbytes} bytes, expected {shard.nbytes}"))
    if not contents.header.startswith(shard.header):
        raise OutputError(_not_written(path, "its header differs"))
    for name, digest in contents.tensors.items():
        if written.get(name) != digest:
            raise OutputError(_not_written(path, f"SHA-256 mismatch of {name}"))


def _not_written(path: Path, reason: str) -> str:
    return f"{path} does not hold what this run wrote ({reason}): run again with --resume to write that part again"


def listed_difference(folder: Path, name: str, entry: Mapping[str, Any], contents: Scan | None = None) -> str | None:
    """How a file differs from its entry in `loftq.json`; None if it does not. The user may edit the card.

    `contents` are those of the file, where it has been read already.
    """
    path = folder / name
    if not path.is_file():
        return "is missing"
    if name == CARD:
        return None
    nbytes, expected = path.stat().st_size, int(entry["bytes"])
    if nbytes != expected:
        return f"has {nbytes} bytes, expected {expected}"
    if not entry.get("sha256"):
        return None
    digest = hash_of(path) if contents is None else contents.sha256
    return None if digest == entry["sha256"] else "SHA-256 mismatch"
