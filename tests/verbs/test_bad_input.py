"""Bad input: one line that says what is wrong, where, and what to do; the right exit code; nothing left behind.

The exit code is 2 for an option that cannot be used, 1 for everything else (`loftq.errors`).

Covers: loftq/errors.py, loftq/planning/weights.py.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from loftq.errors import OptionError

SETTINGS = ("--rank", 4, "--iter", 1, "--quiet")
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


class Refused(NamedTuple):
    """How a command that failed ended: its exit code and its one line of error."""

    exit_code: int
    line: str


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "results" / "out"


@pytest.fixture
def refuse(run: Callable[..., Any], out: Path) -> Callable[..., Refused]:
    """Run a command that must fail, with one line of error that is no traceback."""

    def invoke(*arguments: object) -> Refused:
        ended = run("quantize", *SETTINGS, "--output", out, *arguments)
        assert "Traceback" not in ended.stderr
        errors = [line for line in ended.stderr.splitlines() if line.startswith("Error")]
        usage = [line for line in ended.stderr.splitlines() if line.startswith(("Usage:", "Try ")) or not line]
        assert len(errors) == 1, ended
        assert len(errors) + len(usage) == len(ended.stderr.splitlines()), ended.stderr
        assert not ended.stdout
        return Refused(ended.exit_code, errors[0])

    return invoke


@pytest.fixture
def model(pico: Path, tmp_path: Path) -> Path:
    """A copy of the pico model, to be damaged."""
    return Path(shutil.copytree(pico, tmp_path / "model"))


@pytest.fixture
def sharded(pico_sharded: Path, tmp_path: Path) -> Path:
    """A copy of the pico model in shards, to be damaged."""
    return Path(shutil.copytree(pico_sharded, tmp_path / "sharded"))


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_index(folder: Path, change: Callable[[dict[str, str]], object]) -> Path:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))
    return path


def check(refused: Refused, code: int, names: Sequence[object], out: Path, *, left: bool = False) -> None:
    """The line has all of `names`; the output is untouched or, with `left`, holds a run to give up or resume."""
    assert refused.exit_code == code, refused.line
    for name in names:
        assert str(name) in refused.line, refused.line
    if left:
        assert [path.name for path in out.iterdir()] == [".loftq-partial"]
    else:
        assert not out.parent.exists()


# Options


OPTIONS: list[tuple[list[object], list[str]]] = [
    (["--bits", 9], ["--bits 9", "choose 2, 3, 4, 8"]),
    (["--bits", 5, "--quant-type", "nf"], ["--bits 5", "nf does not have this width", "choose 2, 3, 4, or"]),
    (["--quant-type", "fp"], ["unknown quant type 'fp'", "int, nf"]),
    (["--group-size", 32], ["--group-size 32", "--quant-type int"]),
    (["--zero-point", "float"], ["--zero-point float", "--quant-type int"]),
    (["--quant-type", "int", "--block-size", 32], ["--block-size 32", "--group-size"]),
    (
        ["--quant-type", "int", "--zero-point", "none"],
        ["unknown zero-point 'none'", "float, float32, integer, symmetric"],
    ),
    (["--quant-type", "int", "--group-size", 48], ["group size 48", "use one of -1, 16, 32"]),
    (["--quant-type", "int", "--group-size", 256], ["--group-size 256 does not divide", "use --group-size 64"]),
    (["--quant-type", "int", "--zero-point", "float", "--format", "gptq"], ["float zero-points", "--format loftq"]),
    (["--bits", 8, "--group-size", 32, "--format", "bitsandbytes"], ["holds nf4", "--format gptq or loftq"]),
    (["--bits", 8.5], ["--bits 8.5", "or a budget between them"]),
    (["--bits", "four"], ["'--bits'", "'four'", "float"]),
    (["--alpha", 0], ["--alpha 0", "above 0"]),
    (["--alpha", -1], ["--alpha -1", "above 0"]),
    (["--alpha", "nan"], ["--alpha nan", "above 0"]),
    (["--alpha", "inf"], ["--alpha inf", "at most"]),
    (["--iter", -1], ["--iter -1", "0 to 100 (0 as in QLoRA)"]),
    (["--iter", 101], ["--iter 101", "to 100"]),
    (["--rank", 0], ["--rank 0", "1 or more"]),
    (["--rank", 65], ["--rank 65", "model.layers.0.self_attn.q_proj", "64 x 64", "at most 64"]),
    (["--rank", 65], ["--rank 65", "q_proj", "64 x 64", "at most 64", "--exclude-modules q_proj"]),
    (["--dropout", 1], ["--dropout 1", "below 1"]),
    (["--dropout", -0.1], ["--dropout -0.1", "0 or more"]),
    (["--dropout", "nan"], ["--dropout nan"]),
    (["--seed", -1], ["--seed -1", "expected 0"]),
    (["--svd", "krilov"], ["unknown svd 'krilov'", "did you mean krylov", "exact"]),
    (["--compute-dtype", "int8"], ["'int8'", "bfloat16", "float16", "float32"]),
    (["--block-size", 4096], ["--block-size 4096", "q_proj", "64 inputs", "use --block-size 64"]),
    (["--block-size", 100], ["block size 100", "use one of 32, 64, 128"]),
    (["--block-size", 16], ["block size 16", "use one of 32, 64, 128"]),
    (["--block-size", 0], ["block size 0", "use one of 32"]),
    (["--target-modules", "query"], ["--target-modules 'query'", "k_proj", "o_proj", "down_proj"]),
    (["--target-modules", "q_proj,lm_head"], ["--target-modules 'lm_head'", "q_proj"]),
    (["--exclude-modules", "wq"], ["--exclude-modules 'wq'", "q_proj"]),
    (["--exclude-modules", "*_proj"], ["--exclude-modules", "leaves no linear layer"]),
    (["--no-such-option"], ["No such option", "--no-such-option"]),
    (["--itr", 3], ["No such option", "--itr", "--iter"]),
    (["--rank"], ["'--rank'", "requires an argument"]),
    (["--device", "tpu"], ["--device tpu", "not available", "cpu"]),
    (["--device", "cuda:99"], ["--device cuda:99", "not available", "cpu"]),
    (["--workers", 0], ["--workers 0", "1 to 1024"]),
    (["--workers", -2], ["--workers -2", "1 to 1024"]),
    (["--workers", 5000], ["--workers 5000", "1 to 1024"]),
    (["--max-shard-size", "huge"], ["--max-shard-size 'huge'", "5GB"]),
    (["--max-shard-size", "0"], ["--max-shard-size '0'", "5GB"]),
    (["--max-shard-size", "-1GB"], ["--max-shard-size '-1GB'", "5GB"]),
    (["--max-shard-size", "5XB"], ["--max-shard-size '5XB'", "5GB"]),
    (["--resume", "--overwrite"], ["--resume and --overwrite", "exclude"]),
    (["--model-name-or-path", "another/model"], ["MODEL is given twice", "another/model"]),
    (["another/model"], ["unexpected extra argument", "another/model"]),
]


@pytest.mark.parametrize(("options", "names"), OPTIONS, ids=[" ".join(map(str, options)) for options, _ in OPTIONS])
def test_option(options: list[object], names: list[str], pico: Path, refuse: Callable[..., Refused], out: Path) -> None:
    check(refuse(pico, *options), 2, names, out)


@pytest.mark.parametrize(
    "device",
    [
        "meta",
        "hpu",
    ],
)
def test_a_device_that_cannot_compute(device: str, pico: Path, refuse: Callable[..., Refused], out: Path) -> None:
    check(refuse(pico, "--device", device), 2, [f"--device {device}", "cpu"], out)


def test_underscores_do_not_hide_a_wrong_value(pico: Path, refuse: Callable[..., Refused], out: Path) -> None:
    check(refuse(pico, "--max_shard_size", "huge"), 2, ["'huge'"], out)


def test_float16_cannot_hold_a_weight(model: Path, refuse: Callable[..., Refused], out: Path) -> None:
    """Found when the tensor is read: the run stays, to be given up with --overwrite."""
    norm = "model.layers.1.input_layernorm.weight"
    edit_weights(model, lambda tensors: tensors[norm].__setitem__(3, 1e30))
    names = [norm, "--compute-dtype float16", "use bfloat16"]
    check(refuse(model, "--compute-dtype", "float16"), 2, names, out, left=True)


def test_debug_shows_the_traceback(pico: Path, run: Callable[..., Any], out: Path) -> None:
    """With --debug the error comes through `main` as it is, for the interpreter to print."""
    with pytest.raises(OptionError, match="--bits 9"):
        run("quantize", pico, "--bits", 9, "--output", out, "--debug")


# Where the model is


def test_no_such_folder(tmp_path: Path, refuse: Callable[..., Refused], out: Path) -> None:
    check(refuse(tmp_path / "nowhere"), 1, ["no such folder", tmp_path / "nowhere"], out)


def test_a_file_for_a_model(pico: Path, refuse: Callable[..., Refused], out: Path) -> None:
    check(refuse(pico / "model.safetensors"), 1, [pico / "model.safetensors", "is a file", "folder"], out)


def test_an_empty_folder(tmp_path: Path, refuse: Callable[..., Refused], out: Path) -> None:
    (tmp_path / "empty").mkdir()
    check(refuse(tmp_path / "empty"), 1, [tmp_path / "empty", "safetensors"], out)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "m.pt", "m.00.pth"])
def test_pickle_only(name: str, model: Path, refuse: Callable[..., Refused], out: Path) -> None:
    """The file is a trap: to load it ends the test's process."""
    (model / "model.safetensors").unlink()
    (model / name).write_bytes(b"cos\n_exit\n(I77\ntR.")
    check(refuse(model), 1, [name, "pickle", "never read", "safe_serialization"], out)


# The weights


@pytest.mark.parametrize("cut", [0, 5, 40, -1])
def test_truncated(cut: int, model: Path, refuse: Callable[..., Refused], out: Path) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:cut])
    check(refuse(model), 1, [weights, "truncated or damaged", "download it again"], out)


def test_truncated_shard(sharded: Path, refuse: Callable[..., Refused], out: Path) -> None:
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    check(refuse(sharded), 1, [shard, "truncated or damaged", "download it again"], out)


@pytest.mark.parametrize(
    "header",
    [b"\xff" * 8, (2**40).to_bytes(8, "little"), (8).to_bytes(8, "little") + b"not json"],
    ids=["ff", "long", "text"],
)
def test_damaged_header(header: bytes, model: Path, refuse: Callable[..., Refused], out: Path) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(header + weights.read_bytes()[len(header) :])
    check(refuse(model), 1, [weights, "truncated or damaged", "download it again"], out)


def test_index_names_a_missing_shard(sharded: Path, refuse: Callable[..., Refused], out: Path) -> None:
    shard = sorted(sharded.glob("model-*.safetensors"))[-1]
    shard.unlink()
    check(refuse(sharded), 1, ["model.safetensors.index.json", shard.name, "download it again"], out)


def test_index_names_a_missing_tensor(sharded: Path, refuse: Callable[..., Refused], out: Path) -> None:
    name = sorted(path.name for path in sharded.glob("model-*.safetensors"))[0]
    index = edit_index(sharded, lambda weight_map: weight_map.update({"model.layers.9.mlp.up_proj.weight": name}))
    check(refuse(sharded), 1, [index, "'model.layers.9.mlp.up_proj.weight'", name], out)


def test_index_lacks_a_tensor(sharded: Path, refuse: Callable[..., Refused], out: Path) -> None:
    edit_index(sharded, lambda weight_map: weight_map.pop(Q_PROJ))
    check(refuse(sharded), 1, [Q_PROJ, "lacks"], out)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '{"weight_map": []}', '{"weight_map": null}'])
def test_index_is_not_one(text: str, sharded: Path, refuse: Callable[..., Refused], out: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    index.write_text(text)
    check(refuse(sharded), 1, [index, "not a safetensors index", "download it again"], out)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", [Q_PROJ, "model.norm.weight", "model.embed_tokens.weight"])
def test_not_finite(name: str, value: float, model: Path, refuse: Callable[..., Refused], out: Path) -> None:
    """Found when the tensor is read: the run stays, and does not load."""

    def damage(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(-1)[7] = value

    edit_weights(model, damage)
    names = [name, model / "model.safetensors", "1 NaN or Inf", "damaged"]
    check(refuse(model), 1, names, out, left=True)


def test_a_missing_tensor(model: Path, refuse: Callable[..., Refused], out: Path) -> None:
    edit_weights(model, lambda tensors: tensors.pop(Q_PROJ))
    check(refuse(model), 1, ["lacks", repr(Q_PROJ), "config"], out)


def test_missing_tensors_are_counted(model: Path, refuse: Callable[..., Refused], out: Path) -> None:
    edit_config(model, num_hidden_layers=3)
    check(refuse(model), 1, ["lacks", "'model.layers.2.self_attn.q_proj.weight'", "8 more"], out)


@pytest.mark.parametrize("name", [Q_PROJ, "model.norm.weight"])
def test_a_tensor_of_another_shape(name: str, model: Path, refuse: Callable[..., Refused], out: Path) -> None:
    edit_weights(model, lambda tensors: tensors.update({name: tensors[name][:32].contiguous()}))
    check(refuse(model), 1, [name, "shape (32", "(64"], out)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_a_weight_in_a_quantized_dtype(
    dtype: torch.dtype, model: Path, refuse: Callable[..., Refused], out: Path
) -> None:
    edit_weights(model, lambda tensors: tensors.update({Q_PROJ: tensors[Q_PROJ].to(dtype)}))
    check(refuse(model), 1, [Q_PROJ, str(dtype), "expected 16 or 32 bits"], out)


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_kept_tensor_of_8_bits(
    name: str, dtype: torch.dtype, model: Path, refuse: Callable[..., Refused], out: Path
) -> None:
    edit_weights(model, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    check(refuse(model), 1, [name, str(dtype), "expected 16 or 32 bits"], out)


# The config


def test_no_config(model: Path, refuse: Callable[..., Refused], out: Path) -> None:
    (model / "config.json").unlink()
    check(refuse(model), 1, [model, "no config.json"], out)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ("\x00", "not valid JSON"),
        ("[]", "it is a list of 0, expected an object"),
        ("null", "it is null, expected an object"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "nested too deeply"),
    ],
    ids=["empty", "cut", "null character", "list", "null", "deep"],
)
def test_config_is_not_json(text: str, reason: str, model: Path, refuse: Callable[..., Refused], out: Path) -> None:
    (model / "config.json").write_text(text)
    check(refuse(model), 1, [model / "config.json", reason, "download it again"], out)


def test_a_billion_layers(model: Path, refuse: Callable[..., Refused], out: Path) -> None:
    edit_config(model, num_hidden_layers=10**9)
    check(refuse(model), 1, [model / "config.json", "num_hidden_layers is 1000000000", "21 tensors"], out)


def test_unknown_model_type(model: Path, refuse: Callable[..., Refused], out: Path) -> None:
    edit_config(model, model_type="lama", architectures=["LamaForCausalLM"])
    names = [model / "config.json", "does not know its model type 'lama'", "upgrade transformers"]
    check(refuse(model), 1, names, out)


def test_code_of_its_own(model: Path, refuse: Callable[..., Refused], out: Path) -> None:
    """The code is a trap: to import it ends the test's process."""
    (model / "configuration_own.py").write_text("import os\nos._exit(77)\n")
    edit_config(model, model_type="own", auto_map={"AutoConfig": "configuration_own.OwnConfig"})
    check(refuse(model), 1, [model, "code of its own", "--trust-remote-code"], out)


@pytest.mark.parametrize("entry", [{"quant_method": "gptq", "bits": 4}, {"load_in_4bit": True}])
def test_already_quantized(entry: dict[str, object], model: Path, refuse: Callable[..., Refused], out: Path) -> None:
    edit_config(model, quantization_config=entry)
    names = [model, "already quantized", entry.get("quant_method", "unknown"), "full-precision"]
    check(refuse(model), 1, names, out)


def test_an_artifact_of_ours_for_a_model(
    pico: Path, tmp_path: Path, run: Callable[..., Any], refuse: Callable[..., Refused], out: Path
) -> None:
    assert run("quantize", pico, *SETTINGS, "--output", tmp_path / "artifact").exit_code == 0
    check(refuse(tmp_path / "artifact"), 1, [tmp_path / "artifact", "already quantized (bitsandbytes)"], out)


def test_an_architecture_of_no_task(model: Path, refuse: Callable[..., Refused], out: Path) -> None:
    edit_config(model, architectures=["LlamaForPoetry"])
    check(
        refuse(model),
        1,
        [model, "llama", "LlamaForPoetry", "--task (transformers has classes for: causal-lm, sequence-class"],
        out,
    )
    edit_config(model, architectures=None)
    check(refuse(model), 1, [model, "no architecture named", "--task (transformers has classes for: causal-lm"], out)


def test_a_task_that_the_family_has_no_class_for(pico: Path, refuse: Callable[..., Refused], out: Path) -> None:
    names = ["--task seq2seq-lm", "llama", "no class of model type llama for", "causal-lm, sequence-classification"]
    check(refuse(pico, "--task", "seq2seq-lm"), 2, names, out)
    check(refuse(pico, "--task", "causal"), 2, ["'causal'", "did you mean causal-lm"], out)


def test_labels_where_there_are_none(pico: Path, refuse: Callable[..., Refused], out: Path) -> None:
    check(refuse(pico, "--num-labels", 3), 2, ["--num-labels 3", "causal-lm"], out)
    check(refuse(pico, "--task", "sequence-classification", "--num-labels", 0), 2, ["--num-labels 0"], out)


@pytest.mark.parametrize("name", ["embed_tokens", "norm", "lm_head"])
def test_targets_that_are_no_linears(name: str, pico: Path, refuse: Callable[..., Refused], out: Path) -> None:
    names = [f"--target-modules '{name}'", name, "q_proj, up_proj, v_proj"]
    check(refuse(pico, "--target-modules", name), 2, names, out)


@pytest.mark.parametrize(
    "change",
    [
        {"num_attention_heads": 0},
        {"hidden_size": "wide"},
        {"hidden_size": 63},
        {"hidden_act": "silly"},
        {"architectures": 3},
        {"dtype": "float12"},
    ],
    ids=str,
)
def test_a_config_that_no_model_can_be_made_from(
    change: dict[str, object], model: Path, refuse: Callable[..., Refused], out: Path
) -> None:
    edit_config(model, **change)
    check(refuse(model), 1, [model / "config.json"], out)


# The output


def test_output_is_a_file(pico: Path, out: Path, refuse: Callable[..., Refused]) -> None:
    out.parent.mkdir()
    out.write_text("mine")
    refused = refuse(pico)
    assert refused.exit_code == 1
    assert f"{out} is a file" in refused.line
    assert "--output" in refused.line
    assert out.read_text() == "mine"


@pytest.mark.parametrize("flags", [[], ["--overwrite"], ["--resume"]])
@pytest.mark.parametrize("content", ["notes.txt", "config.json", "model.safetensors", ".hidden"])
def test_output_is_a_folder_of_others(
    content: str, flags: list[str], pico: Path, out: Path, refuse: Callable[..., Refused]
) -> None:
    out.mkdir(parents=True)
    (out / content).write_text("mine")
    refused = refuse(pico, *flags)
    assert refused.exit_code == 1
    assert str(out) in refused.line
    assert "stays unchanged" in refused.line
    assert "--output" in refused.line
    assert [path.name for path in out.iterdir()] == [content]
    assert (out / content).read_text() == "mine"


def test_output_is_the_model(model: Path, run: Callable[..., Any]) -> None:
    before = sorted(path.name for path in model.iterdir())
    ended = run("quantize", model, *SETTINGS, "--output", model, "--overwrite")
    assert ended.exit_code == 1
    assert "stays unchanged" in ended.stderr
    assert sorted(path.name for path in model.iterdir()) == before


def test_output_is_there_already(
    pico: Path, out: Path, run: Callable[..., Any], refuse: Callable[..., Refused]
) -> None:
    assert run("quantize", pico, *SETTINGS, "--output", out).exit_code == 0
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    refused = refuse(pico)
    assert refused.exit_code == 1
    assert str(out) in refused.line
    assert "--overwrite" in refused.line
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    assert run("quantize", pico, *SETTINGS, "--output", out, "--overwrite").exit_code == 0


def test_output_is_named_by_the_model(pico: Path, tmp_path: Path, run: Callable[..., Any]) -> None:
    """Without --output the folder is known only when the model is: the same refusal."""
    arguments = ("quantize", pico, *SETTINGS, "--save-dir", tmp_path / "zoo")
    assert run(*arguments).exit_code == 0
    refused = run(*arguments)
    assert refused.exit_code == 1
    assert str(tmp_path / "zoo" / "pico-llama-4bit-4rank") in refused.stderr
    assert "--overwrite" in refused.stderr


def test_a_dry_run_writes_nothing(pico: Path, out: Path, run: Callable[..., Any]) -> None:
    assert run("quantize", pico, *SETTINGS, "--output", out, "--dry-run").exit_code == 0
    assert not out.parent.exists()


def test_a_dry_run_refuses_too(model: Path, out: Path, refuse: Callable[..., Refused]) -> None:
    edit_config(model, model_type="lama")
    check(refuse(model, "--dry-run"), 1, ["'lama'"], out)
