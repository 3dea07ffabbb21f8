"""Table of model families: the special needs of each `model_type`. A type without a row is handled in the generic way.

The generic way quantizes every linear between the embeddings and the head. It is right for every model that
transformers can load with bitsandbytes. A row says which linears are quantized, which other modules stay in 16 bits,
and that the tests cover the type.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """One row of the table.

    `targets` are patterns of the linears that are quantized and adapted; a variant of the model may lack some of them.
    `stays` are modules that stay in 16 bits, in addition to embeddings, norms and the head. `tasks` are those that are
    tested.
    """

    model_type: str
    targets: tuple[str, ...] | None = None  # None: every linear
    tasks: tuple[str, ...] = ("causal-lm",)
    stays: tuple[str, ...] = ()
    stock: bool = True  # whether stock transformers and peft load it
    float32: bool = False  # whether transformers' code for it runs only in float32
    tested: bool = True


_LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_BART = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
_PHI = ("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2")
_BLOOM = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
_T5 = ("q", "k", "v", "o", "wi", "wi_0", "wi_1")
_BERT = ("query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense")
_DECODER = ("causal-lm", "sequence-classification")
_ENCODER = ("masked-lm", "sequence-classification", "token-classification", "question-answering", "feature-extraction")
_SEQ2SEQ = ("seq2seq-lm",)
_ROUTER = ("router",)

FAMILIES = {
    family.model_type: family
    for family in (
        Family("llama", _LLAMA, _DECODER),
        Family("mistral", _LLAMA, _DECODER),
        Family("qwen2", _LLAMA, _DECODER),
        Family("qwen3", _LLAMA, _DECODER),
        Family("smollm3", _LLAMA),
        Family("gemma2", _LLAMA),
        Family("gemma3_text", _LLAMA),
        Family(
            "gemma3",
            tuple(f"language_model.*.{name}" for name in _LLAMA),
            ("image-text-to-text",),
            stays=("vision_tower",),
        ),
        Family("olmo2", _LLAMA),
        Family("phi", _PHI),
        Family("phi3", ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")),
        Family("falcon", _BLOOM, stock=False),
        Family("gpt2", ("c_attn", "c_proj", "c_fc"), _DECODER),
        Family("gpt_neox", _BLOOM),
        Family("bloom", _BLOOM),
        Family("opt", _BART),
        Family("mixtral", _LLAMA, stays=_ROUTER, stock=False),
        Family("qwen2_moe", _LLAMA, stays=_ROUTER, stock=False),
        Family("qwen3_moe", _LLAMA, stays=_ROUTER, stock=False),
        Family("olmoe", _LLAMA, stays=_ROUTER, stock=False),
        Family("bart", _BART, ("seq2seq-lm", "sequence-classification")),
        Family("mbart", _BART, _SEQ2SEQ),
        Family("pegasus", _BART, _SEQ2SEQ),
        Family("marian", _BART, _SEQ2SEQ),
        Family("t5", _T5, ("seq2seq-lm", "sequence-classification"), stays=("wo",)),
        Family("mt5", _T5, _SEQ2SEQ, stays=("wo",)),
        Family("bert", _BERT, _ENCODER, stays=("pooler",)),
        Family("roberta", _BERT, _ENCODER, stays=("pooler",)),
        Family("xlm-roberta", _BERT, _ENCODER, stays=("pooler",)),
        Family("electra", _BERT, _ENCODER),
        Family("deberta", ("in_proj", "pos_proj", "pos_q_proj", *_BERT[3:]), _ENCODER, float32=True),
        Family(
            "deberta-v2",
            ("query_proj", "key_proj", "value_proj", "pos_key_proj", "pos_query_proj", *_BERT[3:]),
            _ENCODER,
        ),
        Family("distilbert", ("q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"), _ENCODER),
        Family(
            "albert",
            ("query", "key", "value", "attention.dense", "ffn", "ffn_output", "embedding_hidden_mapping_in"),
            _ENCODER,
            stays=("pooler",),
        ),
        Family("vit", (*_BERT, *_BART, "o_proj"), ("image-classification", "feature-extraction"), stays=("pooler",)),
    )
}


def family_of(model_type: str) -> Family:
    """The row of a model type, or a generic row if the table has none."""
    return FAMILIES.get(model_type, Family(model_type, tasks=(), tested=False))
