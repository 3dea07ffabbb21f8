"""`loftq quantize`."""

from __future__ import annotations

from typing import Any

import click
from huggingface_hub.utils.tqdm import disable_progress_bars

from loftq.models.devices import COMPUTE_DTYPES
from loftq.planning.recipe import SEQUENCE_LENGTH, TOKENS, Recipe
from loftq.verbs.quantize import SAVE_DIR
from loftq.verbs.quantize import quantize as run

from .options import names
from .output import show

_EPILOG = """\b
Examples:
  loftq quantize meta-llama/Llama-2-7b-hf --bits 4 --rank 16 --iter 5
  loftq quantize ./my-model --target-modules q_proj,v_proj --rank 64 --alpha 16
  loftq quantize mistralai/Mistral-7B-v0.1 --dry-run
  loftq quantize ./my-model --bits 2 --rank 64 --calibration my-text.jsonl
  loftq quantize ./my-model --push me/my-model-loftq --private
"""


@click.command(epilog=_EPILOG)
@click.argument("model", required=False, type=click.Path())
@click.option("--model-name-or-path", metavar="MODEL", help="The same as MODEL.")
@click.option("--bits", type=float, default=Recipe.bits, show_default=True, help="2, 3, 4, 8, or a budget between.")
@click.option("--quant-type", help="nf (NormalFloat) or int.  [default: nf up to 4 bits; int above, and for qalora]")
@click.option(
    "--allocation",
    help="Where the bits go: first (first layers 4, rest 2), or auto (least error; default for 2.5 etc.).",
)
@click.option("--adapter", default=Recipe.adapter, show_default=True, help="lora, or qalora: pooled, merges exactly.")
@click.option("--pool-size", type=int, help="Inputs that qalora pools.  [default: the group size]")
@click.option("--rank", type=int, default=Recipe.rank, show_default=True, help="Rank of the adapter.")
@click.option("--method", help="See `loftq methods`.  [default: loftq; with --calibration: calibrated]")
@click.option("--iter", "iters", type=int, help="Alternations; 0 is QLoRA's start.  [default: the method's]")
@click.option(
    "--scales", help="absmax, or search: the part of a block's range that errs least.  [default: the method's]"
)
@click.option("--rounding", help="nearest, feedback, intrinsic.  [default: the method's]")
@click.option(
    "--calibration",
    metavar="TEXT",
    type=click.Path(),
    help="A .txt or .jsonl file, OWNER/NAME[:CONFIG] of the Hub, or `default`.",
)
@click.option("--calibration-tokens", type=int, help=f"How much of it.  [default: {TOKENS}]")
@click.option("--sequence-length", type=int, help=f"Tokens a window.  [default: {SEQUENCE_LENGTH}]")
@click.option(
    "--statistics", help="Folder to keep what calibration found, for other runs.  [default: beside the output]"
)
@click.option("--refine", type=int, help="Steps of distilling the adapter; 0 for none.  [default: the method's]")
@click.option("--alpha", type=float, help="LoRA alpha; the scaling is alpha/rank.  [default: the rank]")
@click.option("--rslora", is_flag=True, help="Rank-stabilized scaling: alpha/sqrt(rank).")
@click.option("--dropout", type=float, default=Recipe.dropout, show_default=True, help="LoRA dropout.")
@click.option("--block-size", type=int, help="Weights a scale of nf.  [default: 64]")
@click.option("--group-size", type=int, help="Weights a scale of int; -1: a row.  [default: 64; at 8 bits a row]")
@click.option(
    "--zero-point", help="Of int: symmetric, integer, float.  [default: integer; 8 bits: symmetric; qalora: float]"
)
@click.option("--double-quant", is_flag=True, help="Store the scales in 8 bits.")
@click.option(
    "--format", help="bitsandbytes (nf4, int8), gptq (integers) or loftq (all).  [default: the first that holds it]"
)
@click.option(
    "--compute-dtype", type=click.Choice(list(COMPUTE_DTYPES)), default=Recipe.compute_dtype, show_default=True
)
@click.option("--target-modules", type=names, help="Names or patterns, commas between.  [default: all linears]")
@click.option("--exclude-modules", type=names, default=(), help="Names or patterns to leave in 16 bits.")
@click.option("--task", help="causal-lm, seq2seq-lm, sequence-classification, ...  [default: the checkpoint's own]")
@click.option("--num-labels", type=int, help="Classes of a classifier: a head of another size begins anew.")
@click.option("--svd", default=Recipe.svd, show_default=True, help="krylov, or exact as in the paper (slow).")
@click.option("--save-dir", default=SAVE_DIR, show_default=True, help="Where {name}-{bits}bit-{rank}rank goes.")
@click.option("--output", type=click.Path(), help="The exact folder to write.")
@click.option("--device", help="Where to solve: cpu, cuda, cuda:1, ...  [default: a GPU where there is one]")
@click.option("--workers", type=int, help="Layers at a time.  [default: the cores, at most 8; 1 on a GPU]")
@click.option("--seed", type=int, default=Recipe.seed, show_default=True)
@click.option("--max-shard-size", default=Recipe.max_shard_size, show_default=True)
@click.option("--revision", help="Branch, tag or commit on the Hub.")
@click.option("--token", help="Hub token; better: `hf auth login`.")
@click.option("--trust-remote-code", is_flag=True, help="Run the Python code that the model brings.")
@click.option("--resume", is_flag=True, help="Finish an interrupted run.")
@click.option("--overwrite", is_flag=True, help="Replace an existing loftq folder.")
@click.option("--push", metavar="REPO_ID", help="Then push the folder to the Hub; see `loftq push`.")
@click.option("--private", is_flag=True, help="Make the repository of --push private.")
@click.option("--dry-run", is_flag=True, help="Show the plan; only headers are read, nothing is written.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@click.option("--quiet", is_flag=True, help="No progress bar.")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def quantize(model: str | None, model_name_or_path: str | None, as_json: bool, debug: bool, **options: Any) -> None:
    """Quantize MODEL and initialize its LoRA adapter: with LoftQ, or, given text, nearer still.

    MODEL is a folder or a Hub id; without one, a small default model is taken. The result is a folder with a
    really quantized backbone and, in loftq_init/, the adapter. Options may be written with underscores.
    """
    del debug  # read by main
    if model and model_name_or_path and model != model_name_or_path:
        raise click.UsageError(f"MODEL is given twice: {model} and {model_name_or_path}")
    if options["quiet"]:
        disable_progress_bars()  # the Hub client's own
    report = run(model or model_name_or_path, **options)
    show(report, as_json)
