"""Safetensors checkpoints, one tensor at a time: a lazy reader, and the plan of shards before the first byte of them.

The reader opens a shard for one tensor and closes it again, so that only that tensor of the file stays mapped. The
plan has every name, dtype and shape; `loftq.formats.shard_writer` writes by it. Only headers are kept in memory.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from loftq.errors import CheckpointError, OptionError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}


def dtype_of(config: Mapping[str, object]) -> torch.dtype:
    """The dtype in which a model computes, from its `config.json`; float16 if that has no dtype."""
    dtype: torch.dtype = getattr(torch, str(config.get("dtype") or config.get("torch_dtype") or "float16"))
    return dtype


@dataclass(frozen=True)
class TensorSpec:
    """The name, dtype and shape of a tensor, as in a header."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        count = 1
        for side in self.shape:
            count *= side
        return count

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a checkpoint by name, from its headers, and the file that holds each tensor."""

    folder: Path
    tensors: Mapping[str, TensorSpec]
    files: Mapping[str, str]

    def read(self, name: str) -> torch.Tensor:
        """Read a tensor. Its bytes of the file stay mapped as long as the tensor exists."""
        path = self.folder / self.files[name]
        try:
            with safe_open(path, "pt") as shard:
                tensor: torch.Tensor = shard.get_tensor(name)
                return tensor
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"cannot read tensor {name!r} of {path} ({error}): download it again") from error


def read_checkpoint(folder: Path) -> Checkpoint:
    """Open a checkpoint folder: `model.safetensors`, or else the shards that its index names.

    Raises CheckpointError if there are no safetensors files, if the index names a shard or a tensor that does not
    exist, or if a shard is truncated or damaged.
    """
    index = folder / INDEX
    names = [path.name for path in folder.iterdir()]
    check_listing(folder, names)
    weight_map = None if SINGLE in names else read_index(folder)
    tensors: dict[str, TensorSpec] = {}
    files: dict[str, str] = {}
    for file in [SINGLE] if weight_map is None else sorted(set(weight_map.values())):
        if not (folder / file).is_file():
            raise CheckpointError(f"{index} names the shard {file!r}, which does not exist: download it again")
        for spec in read_header(folder / file):
            if weight_map is None or weight_map.get(spec.name) == file:
                tensors[spec.name], files[spec.name] = spec, file
    missing = sorted(set(weight_map or ()) - set(tensors))
    if missing and weight_map is not None:
        file = weight_map[missing[0]]
        raise CheckpointError(
            f"{index} names the tensor {missing[0]!r}, which {file!r} does not contain: download both again"
        )
    return Checkpoint(folder, tensors, files)


def check_listing(where: Path | str, names: Collection[str]) -> None:
    """Raise CheckpointError unless a folder's or repository's file names include a safetensors checkpoint."""
    if SINGLE in names or INDEX in names:
        return
    pickled = sorted(name for name in names if re.search(r"\.(bin|pth?|ckpt)$", name))
    if pickled:
        raise CheckpointError(
            f"{where} has only pickled weights ({pickled[0]}), which loftq never reads, because they can run code: "
            "save the model with `save_pretrained(..., safe_serialization=True)` first"
        )
    raise CheckpointError(f"{where} has no {SINGLE} and no {INDEX}: expected a checkpoint in safetensors format")


def read_index(folder: Path) -> dict[str, str]:
    """The file of each tensor, from the index of a sharded checkpoint. Raises CheckpointError."""
    path = folder / INDEX
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        return {str(name): str(file) for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is not a safetensors index ({error!r}): download it again") from error


def read_header(path: Path) -> list[TensorSpec]:
    """The tensors of one safetensors file. Raises CheckpointError if it is truncated or damaged."""
    try:
        with safe_open(path, "pt") as shard:
            slices = {name: shard.get_slice(name) for name in shard.keys()}  # noqa: SIM118 (not a mapping)
            specs = [(name, part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()]
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is truncated or damaged ({error}): download it again") from error
    return [spec_of(name, code, shape, str(path)) for name, code, shape in specs]


def spec_of(name: str, code: str, shape: Sequence[int], where: str) -> TensorSpec:
    """The spec of a tensor, from the dtype code in a header. Raises CheckpointError if torch lacks the dtype."""
    if code not in DTYPES:
        raise CheckpointError(f"{where}: tensor {name!r} has dtype {code}: expected one of {', '.join(DTYPES)}")
    return TensorSpec(name, DTYPES[code], tuple(shape))


_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(text: str | int) -> int:
    """The bytes of a size, which is written as in transformers: `5GB`, `500MB`, `2GiB`, or a number."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]?i?B?)\s*", str(text), re.IGNORECASE)
    size = int(float(match[1]) * _UNITS[match[2].upper()]) if match and match[2].upper() in _UNITS else 0
    if size < 1:
        raise OptionError(f"--max-shard-size {text!r} is not a size: write it like 5GB or 500MB")
    return size


@dataclass(frozen=True)
class Shard:
    """A planned file: its header, and the offset of the bytes of each tensor."""

    file: str
    header: bytes
    offsets: Mapping[str, tuple[int, TensorSpec]]
    nbytes: int


def lay_out(
    groups: Sequence[Sequence[TensorSpec]],
    max_bytes: int,
    name: str = SINGLE,
    metadata: Mapping[str, str] | None = None,
) -> list[Shard]:
    """Pack groups of tensors into shards of at most `max_bytes`. A group is never split.

    A single shard is called `name`; several shards are numbered as in transformers.
    """
    shards: list[list[TensorSpec]] = [[]]
    filled = 0
    for group in groups:
        nbytes = sum(spec.nbytes for spec in group)
        if shards[-1] and filled + nbytes > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].extend(group)
        filled += nbytes
    stem, dot, suffix = name.rpartition(".")
    count = len(shards)
    files = [name] if count == 1 else [f"{stem}-{i:05d}-of-{count:05d}{dot}{suffix}" for i in range(1, count + 1)]
    return [_lay_out_one(file, specs, metadata or {}) for file, specs in zip(files, shards, strict=True)]


def _lay_out_one(file: str, specs: Sequence[TensorSpec], metadata: Mapping[str, str]) -> Shard:
    header: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    offsets: dict[str, tuple[int, TensorSpec]] = {}
    at = 0
    # Wide dtypes come first, as in files that safetensors writes, so that every tensor is aligned to its item size.
    for spec in sorted(specs, key=lambda s: (-s.dtype.itemsize, s.name)):
        end = at + spec.nbytes
        header[spec.name] = {"dtype": _CODES[spec.dtype], "shape": spec.shape, "data_offsets": [at, end]}
        offsets[spec.name] = (at, spec)
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    return Shard(file, head, {n: (len(head) + o, s) for n, (o, s) in offsets.items()}, len(head) + at)


def index_text(shards: Sequence[Shard]) -> str:
    """The text of the index of several shards, as transformers writes it."""
    weight_map = {name: shard.file for shard in shards for name in shard.offsets}
    total = sum(spec.nbytes for shard in shards for _, spec in shard.offsets.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return json.dumps(index, indent=2) + "\n"
