"""Makes batches of examples. Images are read again for each batch, since tensors of all images would fill a disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loftq.hub.images import folders_of
from loftq.models.image_text import ImageText, read_processor
from loftq.training.encoding import IGNORED
from loftq.training.opened import Opened

if TYPE_CHECKING:
    import torch
    from datasets import Dataset

_GPU_MULTIPLE = 8  # products of matrices of 16 bits are fastest on a GPU if their sides are multiples of it


@dataclass(frozen=True)
class Collator:
    """Makes a batch of examples: padded on the right to the longest one, labels with `IGNORED`.

    The length of a batch is a multiple of `multiple`.
    """

    pad_token_id: int
    multiple: int = 1

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Return token ids and types, attention mask and labels: int64 (batch, longest). Labels of a classifier
        are (batch,), or (batch, labels) if they are lists of floats.
        """
        import torch

        ids = self._padded([example["input_ids"] for example in examples], self.pad_token_id)
        if "position_ids" in examples[0]:  # packed: what is padded is one more example, which is not learned
            positions = self._padded([example["position_ids"] for example in examples], 0)
            packed_labels = self._padded([example["labels"] for example in examples], IGNORED)
            return {"input_ids": ids, "position_ids": positions, "labels": packed_labels}
        mask = self._padded([[1] * len(example["input_ids"]) for example in examples], 0)
        labels = [example["labels"] for example in examples]
        batch = {"input_ids": ids, "attention_mask": mask}
        if "token_type_ids" in examples[0]:
            batch["token_type_ids"] = self._padded([example["token_type_ids"] for example in examples], 0)
        if isinstance(labels[0], list) and not any(isinstance(label, float) for label in labels[0]):
            batch["labels"] = self._padded(labels, IGNORED)
        else:
            batch["labels"] = torch.tensor(labels)
        return batch

    def _padded(self, rows: Sequence[list[int]], value: int) -> torch.Tensor:
        import torch

        tensors = [torch.tensor(row, dtype=torch.int64) for row in rows]
        padded = torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)
        return torch.nn.functional.pad(padded, (0, -padded.shape[1] % self.multiple), value=value)


@dataclass(frozen=True)
class ImageCollator:
    """Makes a batch of examples that keep their text and their images. Images get the dtype of the model."""

    image_text: ImageText
    dtype: torch.dtype

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Return what the processor makes of the texts, padded on the right and cut as the examples are, and labels.

        Labels are int64 (batch, longest), `IGNORED` where nothing is learned.
        """
        import torch

        made = self.image_text.batch([one["text"] for one in examples], [one["images"] for one in examples])
        rows, whole = made["input_ids"].shape
        longest = max(len(one["input_ids"]) for one in examples)
        batch = {}
        for name, tensor in made.items():
            of_text = tensor.shape[:2] == (rows, whole) and not tensor.is_floating_point()
            cut = tensor[:, :longest] if of_text else tensor
            batch[name] = cut.to(self.dtype) if cut.is_floating_point() else cut
        labels = torch.full((rows, longest), IGNORED, dtype=torch.int64)
        for row, one in enumerate(examples):
            labels[row, : len(one["labels"])] = torch.tensor(one["labels"])
            batch["attention_mask"][row, len(one["labels"]) :] = 0
        return {**batch, "labels": labels}


def collator_for(examples: Dataset, opened: Opened, data: Sequence[str]) -> Collator | ImageCollator:
    """What makes batches of examples; `data` are the names of the files that they come from."""
    if "images" not in examples.column_names:
        pays = opened.model.device.type == "cuda" and opened.longest % _GPU_MULTIPLE == 0  # never longer than that
        return Collator(opened.tokenizer.pad_token_id, _GPU_MULTIPLE if pays else 1)
    image_text = ImageText(read_processor(opened.folder), opened.tokenizer, folders_of(data))
    return ImageCollator(image_text, opened.model.dtype)
