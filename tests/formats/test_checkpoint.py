"""Reading and writing checkpoints, against safetensors and transformers, which write and read the same files.

Covers: loftq/formats/shard_writer.py.
"""

from __future__ import annotations

import json
import random
import shutil
import struct
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from conftest import pico_llama
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from loftq.errors import CheckpointError, OptionError, SourceError
from loftq.formats.checkpoint import (
    DTYPES,
    INDEX,
    SINGLE,
    Shard,
    TensorSpec,
    check_listing,
    index_text,
    lay_out,
    parse_size,
    read_checkpoint,
    spec_of,
)
from loftq.formats.shard_writer import ShardWriter

SHAPES = [(3, 5), (7,), (), (0,), (4, 0, 2), (2, 3, 4), (1, 1), (63, 33)]  # an odd number of items in all
LIMIT = 10**9


def tensor_of(shape: Sequence[int], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Any bit patterns, where the dtype has no forbidden ones."""
    if dtype == torch.bool:
        return torch.rand(tuple(shape), generator=torch.Generator().manual_seed(seed)) < 0.5
    count = torch.Size(shape).numel() * dtype.itemsize
    raw = torch.randint(0, 256, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return raw.view(dtype).view(tuple(shape))


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equality of bits: NaNs are equal to themselves."""
    if (found.dtype, found.shape) != (expected.dtype, expected.shape):
        return False
    return torch.equal(*(tensor.contiguous().view(-1).view(torch.uint8) for tensor in (found, expected)))


def specs_of(tensors: dict[str, torch.Tensor]) -> list[TensorSpec]:
    return [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]


def write(folder: Path, shards: Sequence[Shard], tensors: dict[str, torch.Tensor]) -> None:
    with ShardWriter(folder, shards) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)


def mixture(dtypes: Sequence[torch.dtype]) -> dict[str, torch.Tensor]:
    """Tensors of all shapes and some dtypes, under names in no order."""
    pairs = [(shape, dtype) for dtype in dtypes for shape in SHAPES]
    tensors = {f"{i * 37 % 101:03d}.é.weight": tensor_of(*pair, seed=i) for i, pair in enumerate(pairs)}
    return dict(random.Random(0).sample(list(tensors.items()), len(tensors)))


# Writing


@pytest.mark.parametrize(
    "dtypes",
    [[dtype] for dtype in DTYPES.values()] + [[torch.uint8, torch.bfloat16, torch.float32, torch.int64]],
    ids=[*DTYPES, "one of each width"],
)
def test_file_is_what_safetensors_saves_byte_for_byte(dtypes: list[torch.dtype], tmp_path: Path) -> None:
    tensors = {name.replace("é", "e"): tensor for name, tensor in mixture(dtypes).items()}
    write(tmp_path, lay_out([[spec] for spec in specs_of(tensors)], LIMIT), tensors)
    save_file(tensors, tmp_path / "expected.safetensors", metadata={"format": "pt"})
    assert (tmp_path / SINGLE).read_bytes() == (tmp_path / "expected.safetensors").read_bytes()


def test_all_dtypes_at_once_load_as_they_were(tmp_path: Path) -> None:
    tensors = mixture(list(DTYPES.values()))
    write(tmp_path, lay_out([specs_of(tensors)], LIMIT), tensors)
    checkpoint = read_checkpoint(tmp_path)
    loaded = load_file(tmp_path / SINGLE)
    assert set(loaded) == set(checkpoint.tensors) == set(tensors)
    for name, tensor in tensors.items():
        assert same(loaded[name], tensor)
        assert same(checkpoint.read(name), tensor)
        assert checkpoint.tensors[name] == TensorSpec(name, tensor.dtype, tuple(tensor.shape))
        assert checkpoint.tensors[name].nbytes == tensor.nbytes
        assert checkpoint.tensors[name].numel == tensor.numel()


def test_every_tensor_lies_aligned_to_its_items_and_without_gaps(tmp_path: Path) -> None:
    tensors = mixture(list(DTYPES.values()))
    [shard] = lay_out([specs_of(tensors)], LIMIT)
    write(tmp_path, [shard], tensors)
    content = (tmp_path / SINGLE).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    assert length % 8 == 0
    header = json.loads(content[8 : 8 + length])
    assert header.pop("__metadata__") == {"format": "pt"}
    places = sorted((*entry["data_offsets"], tensors[name].dtype.itemsize) for name, entry in header.items())
    assert [place[0] for place in places] == [0, *(place[1] for place in places[:-1])]
    assert not [place for place in places if (8 + length + place[0]) % place[2]]
    assert 8 + length + places[-1][1] == len(content) == shard.nbytes


def test_order_and_threads_do_not_show_in_the_files(tmp_path: Path) -> None:
    tensors = mixture([torch.bfloat16, torch.uint8, torch.float32])
    shards = lay_out([[spec] for spec in specs_of(tensors)], 5000)
    assert len(shards) > 2
    write(tmp_path / "in order", shards, tensors)
    with ShardWriter(tmp_path / "at once", shards) as writer, ThreadPoolExecutor(4) as pool:
        names = random.Random(1).sample(sorted(tensors) * 2, 2 * len(tensors))  # each twice
        list(pool.map(lambda name: writer.write(name, tensors[name]), names))
    for shard in shards:
        assert (tmp_path / "at once" / shard.file).read_bytes() == (tmp_path / "in order" / shard.file).read_bytes()


def test_files_may_be_reopened_and_keep_what_is_written(tmp_path: Path) -> None:
    tensors = mixture([torch.float32])
    shards = lay_out([specs_of(tensors)], LIMIT)
    names = sorted(tensors)
    write(tmp_path, shards, {name: tensors[name] for name in names[:3]})
    assert (tmp_path / SINGLE).stat().st_size == shards[0].nbytes  # reserved before anything is there
    write(tmp_path, shards, {name: tensors[name] for name in names[3:]})
    assert all(same(tensor, tensors[name]) for name, tensor in load_file(tmp_path / SINGLE).items())


def test_a_second_writer_joins_what_is_there_already(tmp_path: Path) -> None:
    """Each writes some of the tensors, and the first waits for the disk for both. One that finds no file is refused."""
    tensors = mixture([torch.float32])
    shards = lay_out([specs_of(tensors)], LIMIT)
    names = sorted(tensors)
    with pytest.raises(FileNotFoundError), ShardWriter(tmp_path, shards, join=True):
        pass
    with ShardWriter(tmp_path, shards) as first, ShardWriter(tmp_path, shards, join=True) as second:
        first.sync()
        for name in names:
            (second if name in names[:3] else first).write(name, tensors[name])
        first.sync()
        first.include(names[:3])
        assert first._unsynced == {SINGLE}
    assert all(same(tensor, tensors[name]) for name, tensor in load_file(tmp_path / SINGLE).items())


def test_tensors_need_not_be_contiguous(tmp_path: Path) -> None:
    tensors = {
        "a": torch.arange(12.0).view(3, 4).t(),
        "b": torch.arange(10)[::3],
        "c": torch.ones(2, 3, requires_grad=True),
    }
    write(tmp_path, lay_out([specs_of(tensors)], LIMIT), tensors)
    assert all(same(tensor, tensors[name].detach()) for name, tensor in load_file(tmp_path / SINGLE).items())


@pytest.mark.parametrize("wrong", [torch.zeros(2, 4), torch.zeros(3, 3), torch.zeros(6), torch.zeros(2, 3).half()])
def test_a_tensor_other_than_planned_is_refused(wrong: torch.Tensor, tmp_path: Path) -> None:
    shards = lay_out([[TensorSpec("model.weight", torch.float32, (2, 3))]], LIMIT)
    with (
        ShardWriter(tmp_path, shards) as writer,
        pytest.raises(CheckpointError, match=r"'model\.weight' is .* expected"),
    ):
        writer.write("model.weight", wrong)
    assert not load_file(tmp_path / SINGLE)["model.weight"].any()


def test_metadata_is_stored(tmp_path: Path) -> None:
    shards = lay_out([[TensorSpec("a", torch.int8, (1,))]], LIMIT, metadata={"made by": "loftq"})
    write(tmp_path, shards, {"a": torch.ones(1, dtype=torch.int8)})
    with safe_open(tmp_path / SINGLE, "pt") as file:
        assert file.metadata() == {"format": "pt", "made by": "loftq"}


# Shards


def groups_of(sizes: Sequence[Sequence[int]]) -> list[list[TensorSpec]]:
    return [[TensorSpec(f"{i}.{j}", torch.int8, (n,)) for j, n in enumerate(group)] for i, group in enumerate(sizes)]


def bytes_in(shard: Shard) -> int:
    return sum(spec.nbytes for _, spec in shard.offsets.values())


@pytest.mark.parametrize("seed", range(20))
def test_shards_respect_the_limit_and_never_part_a_group(seed: int) -> None:
    draw = random.Random(seed)
    limit = draw.randint(50, 400)
    groups = groups_of([[draw.randint(0, 40) for _ in range(draw.randint(1, 6))] for _ in range(60)])
    shards = lay_out(groups, limit)
    where = {name: shard.file for shard in shards for name in shard.offsets}
    assert set(where) == {spec.name for group in groups for spec in group}
    assert len(where) == sum(len(shard.offsets) for shard in shards)
    for group in groups:
        assert len({where[spec.name] for spec in group}) == 1
    for shard in shards:
        inside = {name.partition(".")[0] for name in shard.offsets}
        assert bytes_in(shard) <= limit or len(inside) == 1
    for before, after in pairwise(shards):  # no shard ends before it must
        first = min(after.offsets, key=lambda name: int(name.partition(".")[0])).partition(".")[0]
        group = sum(spec.nbytes for spec in groups[int(first)])
        assert bytes_in(before) + group > limit


def test_limit_counts_to_the_byte() -> None:
    assert len(lay_out(groups_of([[50], [50]]), 100)) == 1
    assert len(lay_out(groups_of([[50], [51]]), 100)) == 2
    assert [bytes_in(shard) for shard in lay_out(groups_of([[10], [500], [10]]), 100)] == [10, 500, 10]


def test_shards_are_numbered_as_transformers_numbers_them() -> None:
    assert [shard.file for shard in lay_out(groups_of([[1]]), 10)] == ["model.safetensors"]
    assert [shard.file for shard in lay_out(groups_of([[9]] * 3), 10)] == [
        f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)
    ]
    assert [shard.file for shard in lay_out(groups_of([[9]] * 2), 10, "loftq_init/adapter_model.safetensors")] == [
        f"loftq_init/adapter_model-0000{i}-of-00002.safetensors" for i in (1, 2)
    ]


def test_index_is_what_save_pretrained_writes(tmp_path: Path) -> None:
    model = pico_llama()
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    expected = json.loads((tmp_path / INDEX).read_text())
    state = model.state_dict()
    shards = lay_out([[spec] for spec in specs_of(state)], parse_size("60KB"))
    found = json.loads(index_text(shards))
    assert found["weight_map"] == expected["weight_map"]
    assert list(found["weight_map"]) == list(expected["weight_map"])
    assert found["metadata"]["total_size"] == expected["metadata"]["total_size"]
    write(tmp_path / "ours", shards, state)
    for shard in shards:
        assert (tmp_path / "ours" / shard.file).read_bytes() == (tmp_path / shard.file).read_bytes()


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GB", 5 * 10**9),
        ("500MB", 500 * 10**6),
        ("60KB", 60_000),
        ("2GiB", 2 * 2**30),
        ("1.5MiB", 3 * 2**19),
        ("7kib", 7 * 2**10),
        (" 10 mb ", 10**7),
        ("123", 123),
        ("123B", 123),
        (4096, 4096),
    ],
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


NO_SIZES = ["", "GB", "huge", "-5GB", "0", "0GB", "0.5B", "5TB", "5 G B", "1e9", "nan", "5iB", "5GBs", "½GB", -1]


@pytest.mark.parametrize("text", NO_SIZES)
def test_what_is_no_size_is_refused(text: str | int) -> None:
    with pytest.raises(OptionError, match="is not a size: write it like 5GB or 500MB"):
        parse_size(text)


# Reading


@pytest.mark.parametrize("shape", ["pico", "pico_sharded"])
def test_checkpoints_of_transformers_are_read_tensor_by_tensor(shape: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(shape)
    files = {path.name: load_file(path) for path in folder.glob("*.safetensors")}
    expected = {name: tensor for held in files.values() for name, tensor in held.items()}
    checkpoint = read_checkpoint(folder)
    assert checkpoint.tensors == {spec.name: spec for spec in specs_of(expected)}
    assert checkpoint.files == {name: file for file, held in files.items() for name in held}
    assert all(same(checkpoint.read(name), tensor) for name, tensor in expected.items())


FIRST = "model-00001-of-00004.safetensors"
CUT = slice(0, -1)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (FIRST, None, f"names the shard '{FIRST}', which does not exist"),
        (FIRST, b"", f"{FIRST} is truncated or damaged .*download it again"),
        (FIRST, b"\x00" * 7, f"{FIRST} is truncated or damaged"),
        (FIRST, b"\xff" * 64, f"{FIRST} is truncated or damaged"),
        (FIRST, CUT, f"{FIRST} is truncated or damaged"),
        (INDEX, {"ghost": FIRST}, f"names the tensor 'ghost', which '{FIRST}' does not contain"),
        (
            INDEX,
            {"model.norm.weight": FIRST},
            f"names the tensor 'model.norm.weight', which '{FIRST}' does not contain",
        ),
        *(
            (INDEX, text, "is not a safetensors index")
            for text in (b"", b"{", b"{}", b'{"weight_map": 5}', b"[]", b"null", b"\xff")
        ),
    ],
)
def test_errors_name_the_file_and_the_tensor(
    file: str, content: bytes | slice | dict[str, str] | None, message: str, pico_sharded: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(pico_sharded, tmp_path / "copy"))
    before = (folder / file).read_bytes()
    if isinstance(content, dict):
        index = json.loads(before)
        content = json.dumps({**index, "weight_map": index["weight_map"] | content}).encode()
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(before[content] if isinstance(content, slice) else content)
    with pytest.raises(CheckpointError, match=f"{folder}.*{message}"):
        read_checkpoint(folder)


@pytest.mark.parametrize("pickled", ["pytorch_model.bin", "model.pt", "weights.pth", "model.ckpt"])
def test_pickled_weights_are_refused(pickled: str, tmp_path: Path) -> None:
    (tmp_path / pickled).write_bytes(b"\x80\x04.")
    with pytest.raises(SourceError, match=rf"has only pickled weights \({pickled}\).*safe_serialization=True"):
        read_checkpoint(tmp_path)
    with pytest.raises(SourceError, match="user/model has only pickled weights"):
        check_listing("user/model", ["config.json", pickled])


def test_no_weights_at_all_are_refused(tmp_path: Path) -> None:
    message = "has no model.safetensors and no model.safetensors.index.json"
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        check_listing("user/model", ["config.json", "consolidated.safetensors"])
    check_listing("user/model", [SINGLE, "pytorch_model.bin"])
    check_listing("user/model", [INDEX])


def test_a_shard_that_shrinks_between_header_and_tensor_is_an_error(pico: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(pico, tmp_path / "copy"))
    checkpoint = read_checkpoint(folder)
    (folder / SINGLE).write_bytes((folder / SINGLE).read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"cannot read tensor 'model\.norm\.weight' of .*model\.safetensors"):
        checkpoint.read("model.norm.weight")


def test_a_dtype_that_torch_lacks_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"here: tensor 'model\.weight' has dtype F4: expected one of F64, "):
        spec_of("model.weight", "F4", [2, 2], "here")


def test_a_single_file_goes_before_an_index(pico: Path, pico_sharded: Path, tmp_path: Path) -> None:
    """Oracle: transformers, which reads `model.safetensors` where both are there."""
    both = shutil.copytree(pico_sharded, tmp_path / "both")
    shutil.copyfile(pico / "model.safetensors", both / "model.safetensors")
    assert set(read_checkpoint(both).files.values()) == {"model.safetensors"}


OUTSIDE = [
    "../{}",
    "sub/../../{}",
    "/{}",
    "//{}",
    "{parent}/{}",
    "..\\{}",
    "C:\\{}",
    "sub\\{}",
    "{}\0",
    "..",
    ".",
    "",
]


@pytest.mark.parametrize("name", OUTSIDE)
def test_an_index_names_files_inside_its_folder(name: str, pico_sharded: Path, tmp_path: Path) -> None:
    """Oracle: files that hold the tensors are where the names lead, as far as the system takes these names."""
    folder = Path(shutil.copytree(pico_sharded, tmp_path / "a" / "copy"))
    index = json.loads((folder / INDEX).read_text())
    for place in (tmp_path, tmp_path / "a", folder):
        shutil.copy(folder / FIRST, place / f"..\\{FIRST}")
        shutil.copyfile(pico_sharded / FIRST, place / FIRST)
    shard = name.format(FIRST, parent=tmp_path)
    index["weight_map"] = {key: shard if file == FIRST else file for key, file in index["weight_map"].items()}
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"expected a file name inside its folder.: download it again"):
        read_checkpoint(folder)


def test_an_index_may_name_a_file_in_a_subfolder(pico_sharded: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(pico_sharded, tmp_path / "copy"))
    (folder / "sub").mkdir()
    shutil.move(folder / FIRST, folder / "sub")
    text = (folder / INDEX).read_text()
    (folder / INDEX).write_text(text.replace(FIRST, f"sub/{FIRST}"))
    assert read_checkpoint(folder).tensors == read_checkpoint(pico_sharded).tensors
