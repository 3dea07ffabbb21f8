"""Tensors read at their offsets: the oracle is safetensors' own reader. Opens and headers are counted, not timed."""

from __future__ import annotations

import json
import os
import pickle
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from loftq.errors import CheckpointError
from loftq.formats import tensor_files
from loftq.formats.checkpoint import DTYPES, INDEX, SINGLE, read_checkpoint
from loftq.formats.tensor_files import OPEN_FILES, TensorFiles


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often files are opened and headers parsed."""
    counts: Counter[str] = Counter()
    parse, open_file = tensor_files._read_header, tensor_files._OpenFile.__init__

    def counting_parse(descriptor: int, path: Path) -> tensor_files._Header:
        counts["headers"] += 1
        return parse(descriptor, path)

    def counting_open(self: tensor_files._OpenFile, path: Path) -> None:
        counts["opens"] += 1
        open_file(self, path)

    monkeypatch.setattr(tensor_files, "_read_header", counting_parse)
    monkeypatch.setattr(tensor_files._OpenFile, "__init__", counting_open)
    return counts


def shards(folder: Path, files: int, tensors: int) -> dict[str, torch.Tensor]:
    """A sharded checkpoint of small tensors."""
    held: dict[str, torch.Tensor] = {}
    weight_map: dict[str, str] = {}
    for i in range(files):
        part = {f"{i}.{j}": torch.full((2, 3), float(100 * i + j)) for j in range(tensors)}
        save_file(part, folder / f"{i}.safetensors")
        held |= part
        weight_map |= dict.fromkeys(part, f"{i}.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return held


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_a_file_is_opened_and_parsed_once_for_all_of_its_tensors(tmp_path: Path, counted: Counter[str]) -> None:
    held = shards(tmp_path, 3, 50)
    checkpoint = read_checkpoint(tmp_path)
    for name in [*held, *reversed(held)]:
        assert torch.equal(checkpoint.read(name), held[name])
    assert counted == {"headers": 3, "opens": 3}


def test_many_shards_keep_few_files_open_and_no_header_is_parsed_again(tmp_path: Path, counted: Counter[str]) -> None:
    held = shards(tmp_path, 3 * OPEN_FILES, 2)
    before = descriptors()
    checkpoint = read_checkpoint(tmp_path)
    for _ in range(2):
        for name in held:
            assert torch.equal(checkpoint.read(name), held[name])
    assert descriptors() - before <= OPEN_FILES
    assert counted["headers"] == 3 * OPEN_FILES
    del checkpoint
    assert descriptors() == before


def test_every_dtype_shape_and_threads_read_what_safetensors_reads(tmp_path: Path) -> None:
    numbers = torch.arange(24, dtype=torch.float32)
    tensors = {code: numbers.to(dtype).view(2, 3, 4) for code, dtype in DTYPES.items()}
    tensors |= {"empty": torch.empty(0, 4), "scalar": torch.tensor(3.5), "odd": torch.ones(5, dtype=torch.uint8)}
    save_file(tensors, tmp_path / SINGLE)
    expected, checkpoint = load_file(tmp_path / SINGLE), read_checkpoint(tmp_path)
    names = list(tensors) * 8
    with ThreadPoolExecutor(4) as pool:
        for name, tensor in zip(names, pool.map(checkpoint.read, names), strict=True):
            assert tensor.dtype == expected[name].dtype
            assert tensor.shape == expected[name].shape
            assert torch.equal(tensor.view(-1).view(torch.uint8), expected[name].view(-1).view(torch.uint8))
    assert torch.equal(checkpoint.read_first("F32", 5), numbers[:5])
    assert torch.equal(checkpoint.read_first("BF16", 100), numbers.bfloat16())


def test_a_tensor_may_be_changed_without_changing_the_file(tmp_path: Path) -> None:
    save_file({"a": torch.ones(4)}, tmp_path / SINGLE)
    checkpoint = read_checkpoint(tmp_path)
    checkpoint.read("a").zero_()
    assert torch.equal(checkpoint.read("a"), torch.ones(4))


@pytest.mark.parametrize("how", ["replaced", "written over", "cut", "removed"])
def test_a_file_that_changes_during_a_run_is_noticed(how: str, tmp_path: Path) -> None:
    path = tmp_path / SINGLE
    save_file({"a": torch.ones(4), "b": torch.ones(4)}, path)
    checkpoint = read_checkpoint(tmp_path)
    checkpoint.read("a")
    content = path.read_bytes()
    if how == "replaced":
        (tmp_path / "new").write_bytes(content)
        (tmp_path / "new").replace(path)
    elif how == "written over":
        path.write_bytes(content[:-1] + b"\x01")
        os.utime(path, ns=(0, 0))
    elif how == "cut":
        path.write_bytes(content[:-4])
    else:
        path.unlink()
    reason = "the file has changed|No such file"
    with pytest.raises(CheckpointError, match=rf"cannot read tensor 'b' of .*{SINGLE} \(({reason})"):
        checkpoint.read("b")


def test_a_forked_process_reads_the_same_tensors(tmp_path: Path) -> None:
    held = shards(tmp_path, 2, 20)
    checkpoint = read_checkpoint(tmp_path)
    child = os.fork()
    if child == 0:
        os._exit(0 if all(torch.equal(checkpoint.read(name), held[name]) for name in held) else 1)
    assert all(torch.equal(checkpoint.read(name), held[name]) for name in held)
    assert os.waitpid(child, 0)[1] == 0


def test_open_files_are_not_sent_to_another_process(tmp_path: Path) -> None:
    save_file({"a": torch.ones(4)}, tmp_path / SINGLE)
    files = TensorFiles(tmp_path, CheckpointError, "download it again")
    files.read(SINGLE, "a")
    copy = pickle.loads(pickle.dumps(files))
    assert torch.equal(copy.read(SINGLE, "a").view(torch.float32), torch.ones(4))


@pytest.mark.parametrize(
    ("header", "body"),
    [
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 16]}}, 16),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}}, 16),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, 16),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, 4),
        ({n: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} for n in "ab"}, 8),
        ({"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}, 8),
        ({"a": {"dtype": "F32", "shape": [2]}}, 8),
        ([], 0),
    ],
    ids=["too long", "a gap", "bytes left", "cut", "overlap", "negative", "no offsets", "a list"],
)
def test_headers_that_safetensors_refuses_are_refused(header: object, body: int, tmp_path: Path) -> None:
    text = json.dumps(header).encode()
    (tmp_path / SINGLE).write_bytes(len(text).to_bytes(8, "little") + text + bytes(body))
    with pytest.raises(CheckpointError, match=f"{SINGLE} is truncated or damaged .*download it again"):
        read_checkpoint(tmp_path)
