"""Safetensors checkpoints, one tensor at a time: a lazy reader, and the plan of shards before the first byte of them.

The reader parses the header of each shard once, and reads the bytes of one tensor at a time (`tensor_files`). The
plan has every name, dtype and shape; `loftq.formats.shard_writer` writes by it. Only headers are kept in memory.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from loftq.errors import CheckpointError, OptionError
from loftq.formats.links import refuse_outside
from loftq.formats.model_files import check_model_folder
from loftq.formats.schema import check_value, file_name, json_text, read_json, shown, whole
from loftq.formats.tensor_files import TensorFiles
from loftq.tables import LazyTable

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_REMEDY = "download it again"
DTYPES: Mapping[str, torch.dtype] = LazyTable(
    {
        "F64": "torch:float64",
        "F32": "torch:float32",
        "F16": "torch:float16",
        "BF16": "torch:bfloat16",
        "F8_E4M3": "torch:float8_e4m3fn",
        "F8_E5M2": "torch:float8_e5m2",
        "I64": "torch:int64",
        "I32": "torch:int32",
        "U32": "torch:uint32",
        "I16": "torch:int16",
        "I8": "torch:int8",
        "U8": "torch:uint8",
        "BOOL": "torch:bool",
    }
)


def dtype_of(config: Mapping[str, object]) -> torch.dtype:
    """The dtype in which a model computes, from its `config.json`; float16 if that has no dtype."""
    import torch

    name = config.get("dtype") or config.get("torch_dtype") or "float16"
    dtype = getattr(torch, name, None) if isinstance(name, str) else None
    if not isinstance(dtype, torch.dtype):
        raise CheckpointError(f"config.json: dtype is {shown(name)}, expected a dtype of torch such as bfloat16")
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
    """The tensors of a checkpoint by name, from its headers, and the file that holds each tensor.

    `opened` are these files, if their headers were read here.
    """

    folder: Path
    tensors: Mapping[str, TensorSpec]
    files: Mapping[str, str]
    opened: TensorFiles | None = field(default=None, repr=False, compare=False)

    @cached_property
    def _opened(self) -> TensorFiles:
        return self.opened or TensorFiles(self.folder, CheckpointError, _REMEDY)

    def read(self, name: str) -> torch.Tensor:
        """Read a tensor. Raises CheckpointError if it cannot be read, or if its file has changed."""
        spec = self.tensors[name]
        file = self.files[name]
        data = self._opened.read(file, name)
        if data.numel() != spec.nbytes:
            raise CheckpointError(f"tensor {name!r} of {self.folder / file} has {data.numel()} bytes: {_REMEDY}")
        return data.view(spec.dtype).view(spec.shape)

    def read_member(self, name: str, index: int) -> torch.Tensor:
        """Read one of the tensors that are stacked along the first dimension of a tensor."""
        spec = self.tensors[name]
        member = spec.nbytes // spec.shape[0]
        data = self._opened.read(self.files[name], name, member, index * member)
        return data.view(spec.dtype).view(spec.shape[1:])

    def read_first(self, name: str, count: int) -> torch.Tensor:
        """Read at most the first `count` values of a tensor, flat."""
        dtype = self.tensors[name].dtype
        return self._opened.read(self.files[name], name, count * dtype.itemsize).view(dtype)


def read_checkpoint(folder: Path) -> Checkpoint:
    """Open a checkpoint folder: `model.safetensors`, or else the shards that its index names.

    Raises CheckpointError if there are no safetensors files, if the index names a shard or a tensor that does not
    exist, or if a shard is truncated or damaged.
    """
    index = folder / INDEX
    check_model_folder(folder)
    names = [path.name for path in folder.iterdir()]
    check_listing(folder, names)
    weight_map = None if SINGLE in names else read_index(folder)
    tensors: dict[str, TensorSpec] = {}
    files: dict[str, str] = {}
    shards = [SINGLE] if weight_map is None else sorted(set(weight_map.values()))
    refuse_outside(folder, shards)
    opened = TensorFiles(folder, CheckpointError, _REMEDY)
    for file in shards:
        if not (folder / file).is_file():
            raise CheckpointError(f"{index} names the shard {file!r}, which does not exist: download it again")
        for spec in _specs(opened, folder, file):
            if weight_map is None or weight_map.get(spec.name) == file:
                tensors[spec.name], files[spec.name] = spec, file
    missing = sorted(set(weight_map or ()) - set(tensors))
    if missing and weight_map is not None:
        file = weight_map[missing[0]]
        raise CheckpointError(
            f"{index} names the tensor {missing[0]!r}, which {file!r} does not contain: download both again"
        )
    return Checkpoint(folder, tensors, files, opened)


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
    index: dict[str, dict[str, str]] = read_json(
        path,
        {"weight_map": {str: file_name}},
        error=CheckpointError,
        fault="is not a safetensors index",
        advice="download it again",
    )
    return index["weight_map"]


def read_header(path: Path) -> list[TensorSpec]:
    """The tensors of one safetensors file. Raises CheckpointError if it is truncated or damaged."""
    return _specs(TensorFiles(path.parent, CheckpointError, _REMEDY), path.parent, path.name)


def _specs(opened: TensorFiles, folder: Path, file: str) -> list[TensorSpec]:
    where = str(folder / file)
    return [spec_of(name, place.code, place.shape, where) for name, place in opened.places(file).items()]


def spec_of(name: str, code: str, shape: Sequence[int], where: str) -> TensorSpec:
    """The spec of a tensor, from the dtype code in a header. Raises CheckpointError if torch lacks the dtype."""
    check_entry(name, code, shape, where)
    return TensorSpec(name, DTYPES[code], tuple(shape))


def check_entry(name: str, code: str, shape: Sequence[int], where: str) -> None:
    """Raise CheckpointError unless a tensor in a header has a shape, and a dtype that torch has."""
    check_value(list(shape), [whole(0, 2**62)], f"{where}: the shape of tensor {name!r}", error=CheckpointError)
    if code not in DTYPES:
        raise CheckpointError(f"{where}: tensor {name!r} has dtype {code}: expected one of {', '.join(DTYPES)}")


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
    codes = {dtype: code for code, dtype in DTYPES.items()}
    header: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    offsets: dict[str, tuple[int, TensorSpec]] = {}
    at = 0
    # Wide dtypes come first, as in files that safetensors writes, so that every tensor is aligned to its item size.
    for spec in sorted(specs, key=lambda s: (-s.dtype.itemsize, s.name)):
        end = at + spec.nbytes
        header[spec.name] = {"dtype": codes[spec.dtype], "shape": spec.shape, "data_offsets": [at, end]}
        offsets[spec.name] = (at, spec)
        at = end
    text = json_text(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    return Shard(file, head, {n: (len(head) + o, s) for n, (o, s) in offsets.items()}, len(head) + at)


def index_text(shards: Sequence[Shard]) -> str:
    """The text of the index of several shards, as transformers writes it."""
    weight_map = {name: shard.file for shard in shards for name in shard.offsets}
    total = sum(spec.nbytes for shard in shards for _, spec in shard.offsets.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return json_text(index, indent=2) + "\n"
