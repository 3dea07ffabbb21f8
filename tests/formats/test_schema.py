"""Every JSON that we read, with each part of it replaced in turn: it is read, or refused in one line with the file.

Covers: loftq/formats/model_config.py.
"""

from __future__ import annotations

import copy
import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import Result

import loftq
from loftq.calibration.statistics import read_record
from loftq.errors import ArtifactError, CheckpointError, LoftQError, OutputError, SourceError
from loftq.formats import gptq
from loftq.formats.adapter import open_adapter
from loftq.formats.artifact import read_manifest
from loftq.formats.checkpoint import read_checkpoint, read_index, spec_of
from loftq.formats.model_config import config_text, read_config
from loftq.formats.schema import finite, json_text, number, one_of, parse_json, read_json, whole
from loftq.hub.destination import Destination
from loftq.models.adapters import trained_on
from loftq.models.tasks import build_meta
from loftq.training.run_folder import check_run_folder

DEEP = "[" * 100_000 + "]" * 100_000
NESTED: Any = 1
for _ in range(80):
    NESTED = [NESTED]
BAD = [None, True, -1, 0, 1.5, 10**30, float("nan"), float("inf"), "", "1", "\x1b[31mred", "\0", [], {}, [[]], {"a": 1}]
BAD += ["\ud800", [None], ["\0"], NESTED]
ADAPTER = "adapter_config.json"


def mutations(document: Any, bad: list[Any] | None = None) -> Iterator[tuple[str, Any]]:
    """The document with one part dropped or replaced, for each part; of a list only the first item is changed."""
    for path in _paths(document):
        *parents, last = path
        for value in ["dropped", *(BAD if bad is None else bad)]:
            changed = copy.deepcopy(document)
            container = changed
            for key in parents:
                container = container[key]
            if value == "dropped":
                del container[last]
            else:
                container[last] = value
            yield f"{path} = {value!r:.40}", changed


def _paths(value: Any) -> Iterator[list[Any]]:
    items: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        alike = len({type(part) for part in value.values()} - {str}) == 0 or all(
            isinstance(v, dict) for v in value.values()
        )
        items = list(value.items())[: 2 if alike else None]
    elif isinstance(value, list):
        items = list(enumerate(value[:1]))
    for key, part in items:
        yield [key]
        yield from ([key, *rest] for rest in _paths(part))


def check_refusal(error: LoftQError, name: str) -> None:
    """Oracle: one line with the name of the file."""
    message = str(error)
    assert name in message
    assert message.isprintable(), repr(message)


@pytest.fixture(scope="module")
def artifact(pico: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact in shards. Do not write to it."""
    output = tmp_path_factory.mktemp("schema") / "art"
    options = {"rank": 4, "iters": 1, "max_shard_size": "60KB", "quiet": True}
    return loftq.quantize(str(pico), output=output, **options).folder


@pytest.fixture
def folder(artifact: Path, tmp_path: Path) -> Path:
    """A copy of the artifact to damage."""
    return Path(shutil.copytree(artifact, tmp_path / "copy"))


# The language


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe{}", "not valid UTF-8"),
        (b"\xef\xbb\xbf{}", "not valid JSON"),
        (b"[]", "it is a list of 0, expected an object"),
        (b"null", "it is null, expected an object"),
        (DEEP.encode(), "nested too deeply"),
        (json.dumps({"n": 1, "x": NESTED}).encode(), "nested too deeply"),
        (b'{"n": 1, "n": 2}', 'the key "n" occurs twice'),
        (b'{"n": 1, "x": [0, NaN]}', r"x[1] is NaN, expected a finite number"),
        (b'{"n": 1, "x": 1e999}', "x is Infinity, expected a finite number"),
        (b'{"n": 1, "x": {"a.b": -Infinity}}', 'x["a.b"] is -Infinity, expected a finite number'),
        (b'{"n": ' + b"1" * 5000 + b"}", "not valid JSON"),
        (b'{"n": "\\ud800"}', r'n is "\ud800", expected valid Unicode'),
        (b"{}", "n is missing, expected a whole number of at least 0"),
        (b'{"n": "5"}', 'n is "5", expected a whole number of at least 0'),
        (b'{"n": true}', "n is true, expected a whole number of at least 0"),
        (b'{"n": -1}', "n is -1, expected a whole number of at least 0"),
        (b'{"n": 1e3}', "n is 1000.0, expected a whole number of at least 0"),
        (b'{"n": 1, "rows": [{"a": "x"}, {"a": 5}]}', "rows[1].a is 5, expected a text or null"),
        (b'{"n": 1, "files": {"a/b.txt": {}}}', 'files["a/b.txt"].bytes is missing, expected a number'),
        (b'{"n": 1, "files": {"\\u0000": {"bytes": 1}}}', "files is"),
        (b'{"n": 1, "kind": "c\\u001b[31m"}', r'kind is "c\u001b[31m", expected one of a, b'),
        (b'{"n": 1, "share": 2}', "share is 2, expected a number of at least 0"),
    ],
)
def test_each_fault_is_one_line_with_the_key(content: bytes, reason: str, tmp_path: Path) -> None:
    schema = {
        "n": whole(),
        "rows?": [{"a": (str, None)}],
        "files?": {str: {"bytes": float}},
        "kind?": one_of(("a", "b")),
        "share?": number(0, most=1),
    }
    path = tmp_path / "some.json"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as refused:
        read_json(path, schema, error=CheckpointError, advice="do this")
    message = str(refused.value)
    assert message.startswith(f"{path} is damaged (")
    assert reason in message
    assert message.endswith("): do this")
    check_refusal(refused.value, path.name)


def test_what_fits_is_returned_with_keys_that_the_schema_does_not_name() -> None:
    text = '{"a": [1, null], "b": {"x": 0.5, "y": 3}, "new": {"anything": [true]}}'
    schema = {"a": [(int, None)], "b": {str: float}, "absent?": str}
    assert parse_json(text, "here", schema) == json.loads(text)


def test_files_of_other_programs_may_repeat_keys_and_hold_infinities(tmp_path: Path) -> None:
    """Python writes infinities so; transformers reads them from objects too, which are strict JSON."""
    (tmp_path / "config.json").write_text('{"limit": [0.0, Infinity], "a": 1, "a": 2}')
    config = read_config(tmp_path)
    assert config == {"limit": [0.0, float("inf")], "a": 2}
    assert json.loads(config_text(config), parse_constant=pytest.fail)["limit"] == [0.0, {"__float__": "Infinity"}]


def test_what_is_written_is_strict() -> None:
    with pytest.raises(OutputError, match=r"cannot write layers\[1\]\.error as JSON"):
        json_text({"layers": [{"error": 1.0}, {"error": float("nan")}]})
    assert finite({"a": (1.5, float("inf")), "b": {"c": float("nan")}}) == {"a": [1.5, None], "b": {"c": None}}


def test_a_file_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=rf"{tmp_path} cannot be read \(Is a directory\): copy or download"):
        read_json(tmp_path, dict)


# Each kind of file, read directly


def _account(document: Any) -> None:
    from loftq.hub import destination

    destination.check_value(document, destination._ACCOUNT, "the answer of the Hub", error=LoftQError)
    destination._check_owner(document, "me/x", True, True)


def readers(artifact: Path, pico_sharded: Path, scratch: Path) -> dict[str, tuple[Any, str, Callable[[Any], object]]]:
    """For each kind: a good document, the name that an error must have, and the function that reads a document."""

    def written(folder: Path, name: str, read: Callable[[], object]) -> Callable[[Any], object]:
        def run(document: Any) -> object:
            (folder / name).write_text(json.dumps(document))
            return read()

        return run

    adapter = Path(shutil.copytree(artifact / "loftq_init", scratch / "adapter"))
    sharded = Path(shutil.copytree(pico_sharded, scratch / "sharded"))
    statistics = {
        "version": 2,
        "source": {"name": "m", "headers_sha256": "a", "config_sha256": "b"},
        "settings": {
            "tokens": 64,
            "sequence_length": 64,
            "seed": 0,
            "task": "causal-lm",
            "text_sha256": "a",
            "tokenizer_sha256": "b",
            "windows_sha256": "c",
        },
        "modules": {"m": {"count": 5, "file": "moment-0.safetensors"}, "n": {"count": 0, "file": None}},
        "notes": ["a"],
        "weights": {"m.weight": "a"},
    }
    training = {"settings": {"model": "x"}, "backbone": {"model": "x", "sha256": "y"}, "result": {}}
    entry = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "checkpoint_format": "gptq_v2"}
    settings = SimpleNamespace(differences=lambda _: ["seed"])
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    hub = SimpleNamespace(token=None)
    pushed = Destination(hub, "me/x", False, None, None, False, True, "c", None, frozenset({"loftq.json", "a"}))  # type: ignore[arg-type]
    manifest = json.loads((artifact / "loftq.json").read_text())
    manifest["layers"] = manifest["layers"][:1]
    small = {"backbone_sha256": "x", "files": {"a": {}}}

    def gptq_entry() -> object:
        assert gptq.is_gptq(scratch) in (True, False)
        return gptq.is_gptq(scratch) and gptq.read_config(read_config(scratch)["quantization_config"], scratch)

    return {
        "loftq.json": (
            manifest,
            "loftq.json",
            written(scratch, "loftq.json", lambda: read_manifest(scratch / "loftq.json")),
        ),
        ADAPTER: (
            json.loads((adapter / ADAPTER).read_text()),
            ADAPTER,
            written(adapter, ADAPTER, lambda: _use(adapter)),
        ),
        "calibration.json": (
            statistics,
            "calibration.json",
            written(scratch, "calibration.json", lambda: read_record(scratch)),
        ),
        "training.json of an adapter": (
            training,
            "training.json",
            written(scratch, "training.json", lambda: trained_on(scratch)),
        ),
        "training.json of a run": (
            training,
            str(scratch),
            written(
                scratch, "training.json", lambda: check_run_folder(scratch, settings, resume=True, overwrite=False)
            ),  # type: ignore[arg-type]
        ),
        "index": (index, "index.json", written(sharded, "model.safetensors.index.json", lambda: read_index(sharded))),
        "quantization_config": (
            {"quantization_config": entry},
            "config.json",
            written(scratch, "config.json", gptq_entry),
        ),
        "loftq.json of a repository": (
            small,
            "me/x",
            written(scratch, "loftq.json", lambda: pushed.stale({"backbone_sha256": "x"}, ["b"], False)),
        ),
        "the answer about a token": (
            {"name": "me", "orgs": [{"name": "org"}], "auth": {"accessToken": {"role": "write"}}},
            "",
            _account,
        ),
    }


def _use(folder: Path) -> object:
    """What is computed from an adapter's configuration without its weights."""
    adapter = open_adapter(folder)
    return adapter.kind, adapter.scaling, adapter.pool_size, adapter.modules, adapter.saved


def test_every_mutation_of_every_file_is_read_or_refused_in_one_line(
    artifact: Path, pico_sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loftq.hub.destination.download", lambda *_, **__: tmp_path)
    for kind, (document, name, read) in readers(artifact, pico_sharded, tmp_path).items():
        if kind != "training.json of a run":  # whose settings differ
            read(document)
        refused = 0
        cases = list(mutations(document))
        for where, changed in random.Random(0).sample(cases, min(len(cases), 500)):
            try:
                read(changed)
            except LoftQError as error:
                refused += 1
                check_refusal(error, name)
            except Exception as error:
                pytest.fail(f"{kind}: {where}: {error!r}")
        assert refused > 10, kind


def test_every_mutation_of_a_models_configuration_is_built_or_refused(pico: Path, tmp_path: Path) -> None:
    """Each value of `config.json` is wrong once: transformers' own errors are one line too."""
    model = Path(shutil.copytree(pico, tmp_path / "model"))
    config = json.loads((pico / "config.json").read_text())
    choice = random.Random(0)
    bad = [None, -1, 0, "x", [], {"a": 1}, 10**9, 10**30, float("nan")]
    for where, changed in choice.sample(list(mutations(config, bad)), 90):
        (model / "config.json").write_text(json.dumps(changed))
        try:
            build_meta(model)
        except SourceError as error:
            check_refusal(error, "model")
        except LoftQError as error:
            check_refusal(error, "")
        except Exception as error:
            pytest.fail(f"{where}: {error!r}")


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (
            {"num_hidden_layers": 10**9},
            "num_hidden_layers is 1000000000, expected at most 64, because the checkpoint has 21",
        ),
        ({"num_local_experts": 100_000}, "num_local_experts is 100000"),
        ({"text_config": {"n_layer": 5000}}, "text_config.n_layer is 5000"),
        ({"depths": [2, 10**7]}, r"depths[1] is 10000000"),
        ({"num_labels": 10**9}, "num_labels is 1000000000, expected at most 1000000"),
        ({"vocab_size": 10**12}, "vocab_size is 1000000000000, expected at most"),
        ({"max_position_embeddings": 10**10}, "max_position_embeddings is 10000000000"),
    ],
)
def test_absurd_sizes_are_refused_from_the_configuration(
    change: dict[str, Any], key: str, pico: Path, tmp_path: Path
) -> None:
    """transformers would build such a model for hours; the checkpoint itself has 21 tensors."""
    assert len(read_checkpoint(pico).tensors) == 21
    model = Path(shutil.copytree(pico, tmp_path / "model"))
    config = json.loads((pico / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(SourceError) as refused:
        build_meta(model)
    assert key in str(refused.value)
    check_refusal(refused.value, str(model / "config.json"))


@pytest.mark.parametrize("shape", [[-1], ["4"], [2**63], [None], [1.5]])
def test_shapes_in_the_headers_of_a_repository_are_sizes(shape: list[Any]) -> None:
    with pytest.raises(CheckpointError, match=r"me/x/a\.safetensors: the shape of tensor 'w' is damaged \(\[0\] is"):
        spec_of("w", "F32", shape, "me/x/a.safetensors")


# The same through commands


def check_command(result: Result) -> None:
    """Oracle: done, problems listed, or one line; never a traceback, and nothing that a terminal obeys."""
    assert result.exit_code in (0, 1)
    for output in (result.stdout, result.stderr):
        assert "Traceback" not in output
        assert output.replace("\n", "").isprintable(), repr(output)
    if not result.stdout:
        assert result.stderr.startswith("Error: ")
        assert result.stderr.count("\n") == 1


def test_commands_refuse_a_mutated_manifest_in_one_line(
    folder: Path, run: Callable[..., Result], tmp_path: Path
) -> None:
    document = json.loads((folder / "loftq.json").read_text())
    cases = list(mutations(document, [None, 5, -1, "x", [], {"a": 1}, float("inf")]))
    commands = {
        "inspect": (60, ["inspect", folder]),
        "verify": (3, ["verify", folder, "--quiet"]),
        "report": (3, ["report", folder, "--html", tmp_path / "page.html", "--overwrite"]),
        "merge": (
            5,
            ["merge", folder, "--to", "bf16", "--output", tmp_path / "out", "--overwrite", "--no-check", "--quiet"],
        ),
        "push": (4, ["push", folder, "me/x", "--dry-run", "--quiet"]),
    }
    choice = random.Random(1)
    for name, (count, command) in commands.items():
        for where, changed in choice.sample(cases, count):
            (folder / "loftq.json").write_text(json.dumps(changed))
            try:
                check_command(run(*command))
            except Exception as error:
                pytest.fail(f"{name}: {where}: {error!r}")


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"r": 8}, "r is 8, but the factors of"),
        ({"lora_alpha": None}, "lora_alpha is null, expected a number"),
        ({"use_qalora": True}, "qalora_group_size is missing, expected a whole number"),
        ({"target_modules": 5}, "target_modules is 5, expected a list or a text or null"),
    ],
)
def test_merge_names_the_key_of_an_adapters_configuration(
    change: dict[str, Any], key: str, artifact: Path, run: Callable[..., Result], tmp_path: Path
) -> None:
    adapter = Path(shutil.copytree(artifact / "loftq_init", tmp_path / "adapter"))
    config = json.loads((adapter / ADAPTER).read_text())
    (adapter / ADAPTER).write_text(json.dumps(config | change))
    result = run("merge", artifact, "--adapter", adapter, "--to", "bf16", "--output", tmp_path / "out", "--quiet")
    assert result.exit_code == 1
    assert key in result.stderr
    assert str(adapter / ADAPTER) in result.stderr
    check_command(result)


GENERATE = ["generate", "DIR", "--prompt", "hi", "--max-new-tokens", "2"]
TRAIN = ["train", "DIR", "--data", "DATA", "--output", "OUT", "--dry-run"]
MERGE = ["merge", "DIR", "--to", "bf16", "--output", "OUT", "--quiet"]
AGAIN = ["quantize", "SOURCE", "--output", "DIR", "--rank", "4", "--iter", "1", "--resume", "--quiet"]
EVALUATE = ["evaluate", "DIR", "--data", "DATA", "--quiet"]


@pytest.mark.parametrize(
    ("command", "file", "keys", "value"),
    [
        (GENERATE, "config.json", ["quantization_config", "bnb_4bit_quant_type"], True),
        (GENERATE, "config.json", ["quantization_config", "llm_int8_skip_modules"], ["x"]),
        (GENERATE, "config.json", ["attention_bias"], "x"),
        (GENERATE, "config.json", ["rope_parameters", "rope_type"], "x"),
        (EVALUATE, "config.json", ["num_hidden_layers"], 10**9),
        (EVALUATE, "config.json", ["hidden_size"], -1),
        (GENERATE, "generation_config.json", ["eos_token_id"], "x"),
        (GENERATE, "tokenizer_config.json", ["model_max_length"], {"a": 1}),
        (EVALUATE, "tokenizer_config.json", ["eos_token"], 5),
        (GENERATE, "loftq.json", ["source", "task"], "x"),
        (TRAIN, "loftq.json", ["recipe", "num_labels"], "x"),
        (TRAIN, f"loftq_init/{ADAPTER}", ["bias"], None),
        (TRAIN, f"loftq_init/{ADAPTER}", ["lora_dropout"], "x"),
        (MERGE, "loftq.json", ["recipe", "block_size"], None),
        (MERGE, "loftq.json", ["layers", 0, "shape"], [1, 1]),
        (MERGE, "loftq.json", ["layers", 0, "codebook"], "int8"),
        (AGAIN, "loftq.json", ["totals"], {}),
    ],
)
def test_commands_name_the_file_of_a_value_that_makes_no_sense(
    command: list[str],
    file: str,
    keys: list[Any],
    value: Any,
    folder: Path,
    pico: Path,
    run: Callable[..., Result],
    tmp_path: Path,
) -> None:
    """The errors of transformers and peft about values in a folder's configurations are one line too."""
    document = json.loads((folder / file).read_text())
    *parents, last = keys
    container = document
    for key in parents:
        container = container[key]
    container[last] = value
    (folder / file).write_text(json.dumps(document))
    (tmp_path / "data.jsonl").write_text(json.dumps({"prompt": "a text", "completion": " to learn"}) + "\n")
    places = {"DIR": folder, "DATA": tmp_path / "data.jsonl", "OUT": tmp_path / "out", "SOURCE": pico}
    result = run(*(places.get(word, word) for word in command))
    assert result.exit_code == 1
    error = next(line for line in result.stderr.splitlines() if line.startswith("Error: "))
    assert Path(file).name in error
    assert str(folder) in error
    assert "Traceback" not in result.stderr


def test_what_a_manifest_says_reaches_the_terminal_escaped(folder: Path, run: Callable[..., Result]) -> None:
    """A title, colours, a change of direction and a line break, in every text of `loftq.json` that is shown."""
    manifest = json.loads((folder / "loftq.json").read_text())
    evil = "\x1b]0;title\x07\x1b[31mred\u202e\u200b\nsecond"
    manifest["notes"] = [evil]
    manifest["source"]["model"] = evil
    manifest["versions"][evil] = evil
    manifest["recipe"]["method"] = evil
    manifest["layers"][0]["name"] = evil
    (folder / "loftq.json").write_text(json.dumps(manifest))
    for command in (["inspect", folder], ["verify", folder, "--quiet"], ["inspect", folder, "--json"]):
        result = run(*command)
        for output in (result.stdout, result.stderr):
            assert output.replace("\n", "").isprintable(), repr(output)
        assert r"\u202e" in result.stdout + result.stderr
