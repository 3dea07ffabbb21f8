"""A GGUF file as a backbone: its weights by the names that transformers gives them, one at a time.

Names, and the order of the rows that llama.cpp permutes, are those of transformers' own reader, and the gguf package
dequantizes. transformers loads such a file as dense weights (`gguf_file=`), and llama.cpp runs it as it is.
"""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loftq.display import one_line
from loftq.errors import SourceError
from loftq.formats.checkpoint import Checkpoint, TensorSpec
from loftq.formats.prequantized import DenseView
from loftq.hub.folder import fetch_folder
from loftq.hub.names import subfolder_of
from loftq.hub.source import Source

SUFFIX = ".gguf"
_WHOLE = ("F32", "F16", "BF16", "F64")  # types that are not quantized


@dataclass(frozen=True)
class GgufSource(Source):
    """A GGUF file, which has its configuration in itself."""

    file: str = ""

    def file_states(self) -> dict[str, list[int]]:
        """Size and modification time (ns) of the file."""
        state = (self.folder / self.file).stat()
        return {self.file: [state.st_size, state.st_mtime_ns]}


def is_gguf(name: str) -> bool:
    """Whether a name is that of a GGUF file, here or in a repository."""
    return name.partition("@")[0].lower().endswith(SUFFIX)


def find_gguf(name: str, model: nn.Module, token: str | None) -> GgufSource:
    """A file by its path, or as `OWNER/NAME/FILE.gguf[@REVISION]`, whose weights are those of `model`.

    Raises SourceError for a file that does not exist or cannot be read.
    """
    path = Path(name).expanduser()
    place = None if path.is_file() else subfolder_of(name)
    if place is None and not path.is_file():
        raise SourceError(f"no such file: {name}: check the path, or name a file on the Hub as OWNER/NAME/FILE.gguf")
    if place is not None:
        folder = fetch_folder(place[0], token=token, patterns=[place[1]])
        path = folder / place[1]
        if not path.is_file():
            raise SourceError(f"{place[0]} on the Hub has no {place[1]}: check the name of the file")
    if importlib.util.find_spec("gguf") is None:
        raise SourceError(f"reading {path.name} needs the gguf package: pip install gguf")
    try:
        view = _view(path, model)
    except (ValueError, KeyError, IndexError, NotImplementedError, OSError, AttributeError, TypeError) as error:
        raise SourceError(f"--backbone {name} cannot be read as GGUF: {one_line(error)}") from error
    commit = None if place is None else path.parent.name
    named = str(path.resolve()) if place is None else name.partition("@")[0]
    return GgufSource(named, path.parent, view, commit, local=place is None, file=path.name)


def _view(path: Path, model: nn.Module) -> DenseView:
    from gguf import GGUFReader
    from transformers import modeling_gguf_pytorch_utils

    theirs: Any = modeling_gguf_pytorch_utils
    config = theirs.load_gguf_checkpoint(str(path), return_tensors=False)["config"]
    reader = GGUFReader(str(path))
    architecture = theirs.read_field(reader, "general.architecture")[0]
    processor = theirs.TENSOR_PROCESSORS.get(architecture, theirs.TensorProcessor)(config=config)
    names = theirs.get_gguf_hf_weights_map(model, processor)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tensors: dict[str, TensorSpec] = {}
    decoded: dict[str, Callable[..., torch.Tensor]] = {}
    kinds: Counter[str] = Counter()
    for tensor in reader.tensors:
        name = names.get(tensor.name)
        if name is None:
            continue
        kind = tensor.tensor_type.name
        sides = shapes.get(name, ())
        stored = tuple(int(side) for side in reversed(tensor.shape))
        tensors[name] = TensorSpec(name, torch.float32, sides if sorted(sides) == sorted(stored) else stored)
        if kind not in _WHOLE:
            kinds[kind] += 1
            decoded[name] = partial(_decode, tensor, processor)
    title = f"GGUF, {', '.join(kind for kind, _ in kinds.most_common())}" if kinds else "GGUF"
    files: Mapping[str, str] = dict.fromkeys(tensors, path.name)
    nothing = Checkpoint(path.parent, {}, {})
    return DenseView(path.parent, tensors, files, stored=nothing, title=title, decoded=decoded)


def _decode(tensor: Any, processor: Any, _read: Callable[[str], torch.Tensor]) -> torch.Tensor:
    from gguf import dequantize

    weights = dequantize(tensor.data, tensor.tensor_type)
    processed = processor.process(weights=weights, name=tensor.name, tensor_key_mapping={}, parsed_parameters={})
    return torch.tensor(processed.weights)
