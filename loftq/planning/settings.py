"""The settings of `loftq quantize`: `QuantizeSettings` decide the result, `RunSettings` only how and where it is made.

`loftq.planning.recipe.resolve` chooses the values that `QuantizeSettings` leave open, and `loftq.planning.run.start`
those that `RunSettings` leave open.
"""

from __future__ import annotations

from dataclasses import dataclass

from loftq.core.codebooks import TYPES, ZERO_POINTS
from loftq.core.solvers.methods import METHODS, ROUNDINGS, SCALES, SVD
from loftq.formats.layouts import LAYOUTS
from loftq.models.choices import COMPUTE_DTYPES
from loftq.models.tasks import TASKS
from loftq.settings import check, setting

SAVE_DIR = "model_zoo/loftq"
BLOCK_SIZE = 64  # default number of weights that share one scale
EXPERT_RANK = 4  # default: there is a pair of factors for each expert
FIRST_WIDTHS = (2, 4)  # widths of the allocation `first`, as in the paper
CALIBRATION_TOKENS, SEQUENCE_LENGTH = 65536, 2048  # defaults
TOKENS = 1024  # of the training step whose memory the zoo names
ADAPTERS = {
    "lora": "LoftQ: a plain LoRA that corrects the errors of the backbone",
    "qalora": "QA-LoRA: a LoRA on pooled inputs, which can be merged into the zero-points",
}
SENSITIVE = "sensitive"
ALLOCATIONS = {
    "first": "4 bits for the first layers, 2 for the rest, as in the paper",
    "auto": "the widths that give the least summed error",
    SENSITIVE: "the widths that change the model's answers least, which needs --calibration",
}
_MOST_STEPS = 100_000


@dataclass(frozen=True, kw_only=True)
class QuantizeSettings:
    """The settings that decide the result. If a setting is None, loftq chooses its value.

    The same settings on the same source give the same bytes. Raises OptionError for an invalid value.
    """

    bits: float = setting(
        4,
        "Number of bits of a weight: 2, 3, 4, 8, or a budget between them such as 2.5; for tcq and tcqfast 1.5 to 4.",
        "quantization",
    )
    quant_type: str | None = setting(
        None,
        f"Type of the codes: {', '.join(f'{name} ({kind.title})' for name, kind in TYPES.items())}.",
        "quantization",
        choices=TYPES,
        kind="quant type",
        usual="nf up to 4 bits; int above, and for qalora",
    )
    expert_bits: float | None = setting(
        None,
        "Number of bits of a weight of fused experts.",
        "quantization",
        least=1.5,
        most=8,
        usual="--bits; of a budget the width below",
    )
    allocation: str | None = setting(
        None,
        "How layers share a budget of bits: first (4 bits for the first layers, 2 for the rest), auto (least error), "
        "or sensitive (least change of the answers; needs --calibration, and memory for the whole model).",
        "quantization",
        choices=ALLOCATIONS,
        usual="auto for a budget such as 2.5",
    )
    method: str | None = setting(
        None,
        "How backbone and adapter are computed; `loftq methods` lists the methods.",
        "quantization",
        choices=METHODS,
        usual="loftq; with --calibration: calibrated",
    )
    iters: int | None = setting(
        None,
        "Number of alternations between rounding and adapter; with 0 the adapter adds nothing, as in QLoRA.",
        "quantization",
        least=0,
        most=100,
        hint="(0 as in QLoRA)",
        option="--iter",
        usual="the method's",
    )
    scales: str | None = setting(
        None,
        "How the scale of a block is chosen: absmax, or search (the part of the range with the least error).",
        "quantization",
        choices=SCALES,
        usual="the method's",
    )
    rounding: str | None = setting(
        None,
        "How weights are rounded: nearest, feedback, intrinsic or projected; `loftq methods` explains them.",
        "quantization",
        choices=ROUNDINGS,
        usual="the method's; for calibrated NF types below 3 bits and trellis codes projected",
    )
    block_size: int | None = setting(
        None, "Number of weights that share one scale (NF types).", "quantization", usual=str(BLOCK_SIZE)
    )
    group_size: int | None = setting(
        None,
        "Number of weights that share one scale (integers); -1 for a whole row.",
        "quantization",
        usual=f"{BLOCK_SIZE}; at 8 bits a row",
    )
    zero_point: str | None = setting(
        None,
        "Zero-points of integers: symmetric (none), integer or float.",
        "quantization",
        choices=ZERO_POINTS,
        kind="zero-point",
        usual="integer; at 8 bits symmetric; for qalora float",
    )
    double_quant: bool = setting(False, "Store the scales in 8 bits too.", "quantization")
    format: str | None = setting(
        None,
        f"On-disk format of the backbone: {', '.join(LAYOUTS)}.",
        "quantization",
        choices=LAYOUTS,
        usual="the first that can hold the type",
    )
    compute_dtype: str = setting(
        "bfloat16",
        "Dtype in which the model computes: bfloat16, float16, float32.",
        "quantization",
        choices=COMPUTE_DTYPES,
    )
    svd: str = setting(
        "krylov",
        "How the adapter is factorized: krylov, or exact as in the paper (slow).",
        "quantization",
        choices=SVD,
    )
    seed: int = setting(0, "Seed of all random numbers.", "quantization", least=0, most=2**63 - 1)
    adapter: str = setting(
        "lora",
        "Kind of adapter: lora, or qalora (has pooled inputs and can be merged without loss).",
        "adapter",
        choices=ADAPTERS,
    )
    rank: int = setting(16, "Rank of the adapter.", "adapter", least=1)
    expert_rank: int | None = setting(
        None, "Rank of the adapter of each fused expert.", "adapter", least=1, usual=str(EXPERT_RANK)
    )
    alpha: float | None = setting(
        None,
        "LoRA alpha; the scaling of the adapter is alpha/rank.",
        "adapter",
        above=0,
        most=1e6,
        hint="(default: the rank)",
        usual="the rank",
    )
    rslora: bool = setting(False, "Use rank-stabilized scaling, alpha/sqrt(rank).", "adapter")
    dropout: float = setting(0.0, "Dropout of the adapter while training.", "adapter", least=0, below=1)
    pool_size: int | None = setting(None, "Number of inputs that qalora pools.", "adapter", usual="the group size")
    calibration: str | None = setting(
        None,
        "Text to calibrate on: a .txt or .jsonl file, a data set OWNER/NAME[:CONFIG] on the Hub, or `default`.",
        "calibration",
        metavar="TEXT",
    )
    calibration_tokens: int | None = setting(
        None, "Number of tokens of the text to use.", "calibration", least=1, usual=str(CALIBRATION_TOKENS)
    )
    sequence_length: int | None = setting(
        None, "Number of tokens in a window of the text.", "calibration", least=16, usual=str(SEQUENCE_LENGTH)
    )
    refine: int | None = setting(
        None,
        "Number of distillation steps for the adapter; 0 for none.",
        "calibration",
        least=0,
        most=_MOST_STEPS,
        hint="steps",
        usual="the method's",
    )
    target_modules: tuple[str, ...] | None = setting(
        None,
        "Modules to quantize: names or patterns, separated by commas.",
        "model",
        metavar="NAMES",
        usual="all linears",
    )
    exclude_modules: tuple[str, ...] = setting(
        (), "Modules to leave in 16 bits: names or patterns, separated by commas.", "model", metavar="NAMES"
    )
    backbone: str | None = setting(
        None,
        "A quantized model that you already have: it stays as it is, and only an adapter for it is computed.",
        "model",
        metavar="MODEL",
    )
    task: str | None = setting(
        None,
        "Task of the model: causal-lm, seq2seq-lm, sequence-classification and others.",
        "model",
        choices=TASKS,
        usual="the checkpoint's own",
    )
    num_labels: int | None = setting(
        None,
        "Number of classes of a classifier; a head of another size gets new weights.",
        "model",
        least=1,
        most=1_000_000,
    )
    max_shard_size: str = setting("5GB", "Largest size of one weight file.", "output", metavar="SIZE")

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """The settings of a run that do not change its result: its output, its device, and what is pushed to the Hub."""

    revision: str | None = setting(None, "Branch, tag or commit of MODEL on the Hub.", "model")
    source: str | None = setting(
        None,
        "For a folder of the original LoftQ script: its full-precision model, by which the scaling is checked.",
        "model",
        metavar="MODEL",
    )
    trust_remote_code: bool = setting(False, "Run the Python code that the model brings.", "model")
    save_dir: str = setting(
        SAVE_DIR, "Folder in which the output {name}-{bits}bit-{rank}rank is created.", "output", metavar="DIR"
    )
    output: str | None = setting(None, "The exact folder to write.", "output", metavar="DIR", usual="see --save-dir")
    statistics: str | None = setting(
        None,
        "Folder that keeps the measurements of the calibration for other runs.",
        "calibration",
        metavar="DIR",
        usual="beside the output",
    )
    resume: bool = setting(False, "Finish an interrupted run.", "output")
    overwrite: bool = setting(False, "Replace an existing loftq folder.", "output")
    token: str | None = setting(None, "Hub token; better: `hf auth login`.", "hub")
    push: str | None = setting(
        None, "Push the finished folder to this repository on the Hub; see `loftq push`.", "hub", metavar="REPO_ID"
    )
    private: bool = setting(False, "Create the repository of --push as private.", "hub")
    device: str | None = setting(
        None, "Device on which layers are solved: cpu, cuda, cuda:1 and so on.", "run", usual="a GPU if there is one"
    )
    workers: int | None = setting(
        None,
        "Number of layers that are solved at the same time.",
        "run",
        least=1,
        most=1024,
        usual="the number of cores, at most 8; 1 on a GPU",
    )
    cluster: str | None = setting(
        None,
        "Work on a cluster of Ray: auto (the cluster of RAY_ADDRESS, or all cores or GPUs of this machine), or the "
        "HOST:PORT of a cluster to which this machine belongs. As many tasks run at a time as fit, or --workers.",
        "run",
        metavar="ADDRESS",
    )
    dry_run: bool = setting(False, "Show the plan; only headers are read, and nothing is written.", "run")
    quiet: bool = setting(True, "Show no progress bar.", "run")

    def __post_init__(self) -> None:
        check(self)
