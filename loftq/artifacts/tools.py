"""Other training tools: what each of them can start from, and the configuration that starts it.

A row of TOOLS is a tool. Its writer turns a `Start` into a file that the tool reads as it is; only the names of data
and outputs are left to the user. `ran` says what stands behind a row: the tool was run, or its source was read.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from loftq.errors import OptionError, UnknownNameError

SFT, DPO = "sft", "dpo"
STAGES = {SFT: "supervised fine-tuning", DPO: "direct preference optimization"}


@dataclass(frozen=True)
class Start:
    """What a configuration is written from: the folder, its adapter, and what the tool has to be told again."""

    folder: str
    adapter: str
    kind: str
    bits: int
    rank: int
    alpha: float
    targets: tuple[str, ...]
    stage: str
    data: str


@dataclass(frozen=True)
class Tool:
    """A training tool.

    `imports_loftq` says whether it can start from formats that need `import loftq`; `instead` has the formats that it
    cannot use, and those to quantize to instead. With `adapter_alone` it is told the adapter, and finds the backbone by
    the adapter's configuration. `data` is what stands for the user's data, `refused` has stages that it cannot do with
    our start, and why.
    """

    title: str
    version: str
    ran: bool
    write: Callable[[Start], str]
    imports_loftq: bool = False
    instead: Mapping[str, str] = field(default_factory=dict)
    adapter_alone: bool = False
    data: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({SFT: "chats.jsonl", DPO: "pairs.jsonl"}))
    refused: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))


def _trl(start: Start) -> str:
    trainer = f"{start.stage.upper()}Trainer"
    config = f"{start.stage.upper()}Config"
    return f"""import loftq
from datasets import load_dataset
from transformers import AutoTokenizer
from trl import {config}, {trainer}

model = loftq.load_{start.kind}({_quoted(start.folder)})
trainer = {trainer}(
    model=model,
    args={config}(
        output_dir="trained",
        learning_rate={_rate(start)},
        num_train_epochs=1,
        use_cpu=model.device.type == "cpu",
    ),
    train_dataset=load_dataset("json", data_files={_quoted(start.data)}, split="train"),
    processing_class=AutoTokenizer.from_pretrained({_quoted(start.folder)}),
    callbacks=[loftq.KeepFloat32(model)],  # trl would cast the factors to bfloat16, in which they hardly move
)
trainer.train()
trainer.save_model("trained")
"""


def _unsloth(start: Start) -> str:
    return f"""from unsloth import FastLanguageModel  # before all others
from datasets import load_dataset
from trl import SFTConfig, SFTTrainer

# The folder of the adapter: it names the backbone. After a move, run `loftq relocate` on the folder.
model, tokenizer = FastLanguageModel.from_pretrained(
    {_quoted(start.adapter)}, max_seq_length=2048, load_in_{start.bits}bit=True
)
trainer = SFTTrainer(
    model=model,
    args=SFTConfig(output_dir="trained", learning_rate={_rate(start)}, num_train_epochs=1),
    train_dataset=load_dataset("json", data_files={_quoted(start.data)}, split="train"),
    processing_class=tokenizer,
)
trainer.train()
trainer.save_model("trained")
"""


def _axolotl(start: Start) -> str:
    targets = "".join(f"  - {_quoted(name)}\n" for name in start.targets)
    return f"""base_model: {_quoted(start.folder)}
adapter: {"qlora" if start.bits == 4 else "lora"}
load_in_{start.bits}bit: true
lora_model_dir: {_quoted(start.adapter)}
# axolotl asks for these three again. The configuration of the adapter decides.
lora_r: {start.rank}
lora_alpha: {start.alpha:g}
lora_target_modules:
{targets}
# With `rl: dpo`, `ipo` or `kto`, axolotl ignores lora_model_dir and begins a new adapter on the backbone alone.
datasets:
  - path: {_quoted(start.data)}
    type: chat_template

sequence_len: 2048
micro_batch_size: 1
gradient_accumulation_steps: 8
num_epochs: 1
learning_rate: {_rate(start)}
optimizer: adamw_torch
bf16: true
output_dir: trained
"""


def _llama_factory(start: Start) -> str:
    stage = "stage: sft\n"
    if start.stage == DPO:
        stage = f"""stage: dpo
pref_beta: 0.1
pref_loss: sigmoid
# Without these two, the reference would be the backbone without its adapter.
ref_model: {_quoted(start.folder)}
ref_model_adapters: {_quoted(start.adapter)}
"""
    return f"""# No quantization_bit: the folder is quantized already.
model_name_or_path: {_quoted(start.folder)}
adapter_name_or_path: {_quoted(start.adapter)}
finetuning_type: lora
{stage}do_train: true

dataset: {_quoted(start.data)}  # a name in dataset_info.json
template: default  # the name of the model's chat template in LLaMA-Factory
cutoff_len: 2048
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
num_train_epochs: 1
learning_rate: {_rate(start)}
output_dir: trained
"""


def _swift(start: Start) -> str:
    adapter = shlex.quote(start.adapter)
    command, reference = "sft", ""
    if start.stage == DPO:
        # Without it, the reference would be the backbone without its adapter.
        command, reference = "rlhf --rlhf_type dpo", f" \\\n    --ref_adapters {adapter}"
    return f"""# If the type of the model is not recognized, add --model_type and --template with ms-swift's names.
swift {command} \\
    --model {shlex.quote(start.folder)} \\
    --adapters {adapter}{reference} \\
    --dataset {shlex.quote(start.data)} \\
    --max_length 2048 \\
    --per_device_train_batch_size 1 \\
    --gradient_accumulation_steps 8 \\
    --num_train_epochs 1 \\
    --learning_rate {_rate(start)} \\
    --output_dir trained
"""


def _accelerate_fsdp(start: Start) -> str:
    folder = shlex.quote(start.folder)
    return f"""# accelerate launch --config_file THIS_FILE -m loftq_cli.main train {folder} --data FILE --output trained
# or, with a script that `loftq config {folder} --for trl --output train.py` writes:
# accelerate launch --config_file THIS_FILE train.py
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
num_machines: 1
num_processes: 2  # the number of GPUs
mixed_precision: bf16
fsdp_config:
  fsdp_version: 2
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_reshard_after_forward: true
  fsdp_cpu_ram_efficient_loading: false  # it would load the codes without what belongs to them
  fsdp_state_dict_type: FULL_STATE_DICT
"""


def _rate(start: Start) -> str:
    """A usual learning rate, in a form that YAML takes for a number."""
    return "0.0001" if start.stage == SFT else "0.000005"


def _quoted(text: str) -> str:
    """A text as YAML and Python read it: JSON's strings are theirs too."""
    return json.dumps(text, ensure_ascii=False)


_DATA_NAMES = MappingProxyType({SFT: "my_data", DPO: "my_pairs"})
_SPLIT = MappingProxyType({"bitsandbytes": "bitsandbytes-fsdp"})  # FSDP splits numbers of bitsandbytes, and no bytes
TOOLS: Mapping[str, Tool] = {
    "accelerate-fsdp": Tool("accelerate", "1.15.0", False, _accelerate_fsdp, True, instead=_SPLIT),
    "axolotl": Tool(
        "axolotl",
        "0.19.0",
        True,
        _axolotl,
        refused={DPO: "it ignores lora_model_dir there, and trains a new adapter on the backbone alone"},
    ),
    "llama-factory": Tool("LLaMA-Factory", "0.9.5", True, _llama_factory, data=_DATA_NAMES),
    "ms-swift": Tool("ms-swift", "4.6.0", True, _swift),
    "trl": Tool("trl", "1.16.0", True, _trl, imports_loftq=True),
    "unsloth": Tool(
        "unsloth",
        "2026.10.9",
        False,
        _unsloth,
        adapter_alone=True,
        refused={DPO: "its reference may be the backbone alone: use trl"},
    ),
}


def check_tool(tool: str, stage: str) -> None:
    """Raise OptionError unless there is such a tool, and it can do this stage with our start."""
    if tool not in TOOLS:
        raise UnknownNameError("tool", tool, TOOLS)
    if stage not in STAGES:
        raise UnknownNameError("stage", stage, STAGES)
    if stage in TOOLS[tool].refused:
        raise OptionError(f"--for {tool} --stage {stage}: {TOOLS[tool].refused[stage]}")
