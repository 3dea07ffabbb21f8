"""What an adapter changes about the embeddings of a model: the vocabulary, and whether the output has the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from loftq.artifacts.backbone import Backbone
from loftq.errors import ArtifactError
from loftq.formats.adapter import Adapter

_TIED, _VOCABULARY = "tie_word_embeddings", "vocab_size"


@dataclass(frozen=True)
class Embeddings:
    """What merging an adapter changes about them.

    `untied` has the weight that must be written because it no longer is the same as another one, and the name of this
    other in the backbone. `vocabulary` is the new number of tokens, None if it stays; `before` is the old one. `unties`
    says whether the input and the output have different weights from now on.
    """

    inputs: str | None = None
    untied: Mapping[str, str] | None = None
    unties: bool = False
    vocabulary: int | None = None
    before: int = 0
    names: tuple[str, ...] = ()

    def resizes(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether a tensor of the backbone is a bias of the tokens, (tokens) or (1, tokens), and their number changes.

        transformers resizes it with the embeddings: new tokens have a bias of 0.
        """
        is_bias = name.rpartition(".")[2] in ("bias", "final_logits_bias")
        return self.vocabulary is not None and is_bias and shape in ((self.before,), (1, self.before))

    def config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The configuration of the merged model, from that of the backbone."""
        changes = {_TIED: False} if self.unties else {}
        sizes = {} if self.vocabulary is None else {_VOCABULARY: self.vocabulary}
        text = config.get("text_config")
        if not isinstance(text, Mapping):
            return {**config, **changes, **sizes}
        in_text = sizes | (changes if _TIED in text else {})
        at_top = changes | (sizes if _VOCABULARY in config else {})
        return {**config, **at_top, "text_config": {**text, **in_text}}


def embeddings_of(model: Any, backbone: Backbone, adapter: Adapter) -> Embeddings:
    """Compare the embeddings that an adapter holds with those of a backbone. Raises ArtifactError if they differ."""
    own, head = (_weight_name(model, layer) for layer in (_inputs(model), _outputs(model)))
    names = tuple(name for name in (own, head) if name is not None)
    replaced = [name for name in names if name in adapter.saved]
    settings = (model.config, model.config.get_text_config())
    tied = head is not None and head != own and any(getattr(part, _TIED, False) for part in settings)
    kept_tied = len(replaced) == 1 and bool(adapter.config.get("ensure_weight_tying"))
    unties = tied and bool(replaced) and not kept_tied
    tensors = backbone.checkpoint.tensors
    untied = {}
    if unties and own is not None and head is not None:
        untied = {
            a: b for a, b in ((own, head), (head, own)) if a not in replaced and a not in tensors and b in tensors
        }
    vocabulary = _new_vocabulary(model, adapter, names, replaced, unties)
    before = int(model.config.get_text_config().vocab_size) if names else 0
    tied_names: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    copies = tuple(name for name, source in tied_names.items() if source == own and name != head)  # BART has two
    return Embeddings(own, untied, unties, vocabulary, before, (*names, *copies))


def _new_vocabulary(
    model: Any, adapter: Adapter, names: tuple[str, ...], replaced: list[str], unties: bool
) -> int | None:
    rows = {name: adapter.shapes[adapter.saved[name]][0] for name in replaced}
    old = int(model.config.get_text_config().vocab_size) if names else 0
    if not rows or set(rows.values()) == {old}:
        return None
    tied = len(names) < 2 or (not unties and bool(getattr(model.config, _TIED, False)))
    if len(set(rows.values())) > 1 or (len(rows) < len(names) and not tied):
        sizes = {**dict.fromkeys(names, old), **rows}
        told = ", ".join(f"{name} has {count}" for name, count in sizes.items())
        raise ArtifactError(
            f"the adapter {adapter.folder} changes the number of tokens in one of two tensors only ({told}): "
            "save both with modules_to_save"
        )
    return next(iter(rows.values()))


def _inputs(model: Any) -> nn.Module | None:
    try:
        return model.get_input_embeddings()  # type: ignore[no-any-return]
    except NotImplementedError:
        return None


def _outputs(model: Any) -> nn.Module | None:
    return model.get_output_embeddings()  # type: ignore[no-any-return]


def _weight_name(model: nn.Module, layer: nn.Module | None) -> str | None:
    names = [name for name, module in model.named_modules() if module is layer] if layer is not None else []
    return f"{names[0]}.weight" if names and hasattr(layer, "weight") else None
