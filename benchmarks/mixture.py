"""A small mixture of experts, trained until its routing is uneven, from each start: perplexity before any training.

    python benchmarks/mixture.py --data FILE [FILE ...] --work DIR [--steps 1500] [--starts nf4:16 nf3:16 nf2:16]
                                 [--runs loftq "calibrated --refine 0" calibrated] [--seeds 0]

The texts are cut into pieces and shuffled. The first half trains a model of the type qwen3_moe with 4 layers of 16
experts, of which 2 see a token, and a vocabulary of 2,048 tokens; it is also what is calibrated on. The second half is
evaluated, as in calibrated.py. The model and what was measured are kept in DIR, where a later call finds them.
"""

from __future__ import annotations

import argparse
import math
import random
from pathlib import Path
from typing import Any

import torch
from calibrated import LENGTH, PLAIN, WINDOWS, Bench, spread
from machine import SEED, describe, table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.utils import logging

PIECE = 2000  # characters that stay together when the texts are shuffled
VOCABULARY = 2048
BATCH, RATE = 8, 2e-3  # windows of 256 tokens a step, and the highest rate
WINDOW = 256


def mixed(files: list[Path], path: Path) -> str:
    """The pieces of all texts in a random order, also written to a file."""
    texts = [file.read_text(encoding="utf-8") for file in files]
    pieces = [text[at : at + PIECE] for text in texts for at in range(0, len(text), PIECE)]
    random.Random(SEED).shuffle(pieces)
    text = "".join(pieces)
    path.write_text(text, encoding="utf-8")
    return text


def learned_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """Byte-pair encoding of a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=["<|end|>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")


def trained_model(tokens: torch.Tensor, steps: int) -> Any:
    """The model after `steps` steps of AdamW on random windows of the tokens (n,)."""
    torch.manual_seed(SEED)
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=256,
        moe_intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=16,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        tie_word_embeddings=True,
        max_position_embeddings=1024,
        router_aux_loss_coef=0.001,
        output_router_logits=True,
    )
    model: Any = Qwen3MoeForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 50, 0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    draw = torch.Generator().manual_seed(SEED)
    for step in range(steps):
        starts = torch.randint(len(tokens) - WINDOW, (BATCH,), generator=draw).tolist()
        batch = torch.stack([tokens[at : at + WINDOW] for at in starts])
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)
    model.config.output_router_logits = False
    return model


def made(files: list[Path], work: Path, steps: int) -> Path:
    """The folder of the trained model, trained now or by an earlier call."""
    folder = work / "model"
    if not (folder / "config.json").is_file():
        text = mixed(files, work / "mixed.txt")
        half = text[: len(text) // 2]
        tokenizer = learned_tokenizer(half)
        model = trained_model(tokenizer(half, return_tensors="pt").input_ids[0], steps)
        tokenizer.save_pretrained(folder)
        model.bfloat16().save_pretrained(folder)
    return folder


@torch.no_grad()
def shares(folder: Path, tokens: torch.Tensor) -> list[str]:
    """For each layer, the shares of the tokens that its experts see, from the least to the most used."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    windows = tokens[0, : WINDOWS * LENGTH].view(WINDOWS, LENGTH)
    logits = model(input_ids=windows, output_router_logits=True).router_logits
    lines = []
    for at, layer in enumerate(logits):
        chosen = layer.topk(model.config.num_experts_per_tok).indices.flatten()
        seen = torch.bincount(chosen, minlength=model.config.num_experts).sort().values / len(layer)
        lines.append(f"layer {at}: " + " ".join(f"{share:.3f}" for share in seen.tolist()))
    return lines


def main() -> None:
    """Train, quantize, evaluate, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, nargs="+", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--starts", nargs="+", default=["nf4:16", "nf3:16", "nf2:16"])
    parser.add_argument("--runs", nargs="+", default=["loftq", "calibrated --refine 0", "calibrated"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    options.work.mkdir(parents=True, exist_ok=True)
    folder = made(options.data, options.work, options.steps)
    bench = Bench(str(folder), options.work / "mixed.txt", options.work)
    exact = bench.exact()
    rows: list[tuple[str, ...]] = [("start", "method", "perplexity", "of full precision", "KL")]
    for start in options.starts:
        kind, _, rank = start.partition(":")
        for run in (PLAIN, *options.runs):
            seeds = options.seeds if run.startswith("calibrated") else options.seeds[:1]
            found = [bench.start(run, kind, int(rank), seed) for seed in seeds]
            perplexities = [float(row["perplexity"]) for row in found]
            ratios = spread([value / exact for value in perplexities], 3)
            distances = spread([float(row["kl"]) for row in found], 4)
            rows.append((f"{kind.upper()}, rank {rank}", run, spread(perplexities, 2), ratios, distances))
    print(f"\n{options.steps} steps; the shares of tokens that the experts of each layer see, sorted:")
    print("\n".join(shares(folder, bench.tokens)))
    print(f"\n{WINDOWS} windows of {LENGTH} tokens; full precision {exact:.3f}; seeds {options.seeds}")
    print(f"{describe()}\n\n{table(rows)}")


if __name__ == "__main__":
    main()
