"""A repository on the Hub, read without its weights: small files, and headers of large files by range requests."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loftq.display import one_line
from loftq.errors import SourceError
from loftq.formats.checkpoint import check_entry
from loftq.formats.tensor_files import TensorPlace
from loftq.hub.errors import checked_token, explain_source_refusals
from loftq.hub.snapshot import download


@dataclass(frozen=True)
class Repository:
    """A commit of a repository: the names of its files, and the folder that holds the small ones."""

    name: str
    commit: str
    folder: Path
    files: Collection[str]
    api: Any

    def header(self, file: str) -> Mapping[str, TensorPlace]:
        """The places of the tensors of a safetensors file, counted from the end of its header. Raises SourceError."""
        from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

        try:
            with explain_source_refusals(self.name, self.commit):
                header = self.api.parse_safetensors_file_metadata(self.name, file, revision=self.commit)
                for name, info in header.tensors.items():
                    check_entry(name, info.dtype, info.shape, f"{self.name}/{file}")
                return {
                    name: TensorPlace(info.dtype, tuple(info.shape), *info.data_offsets)
                    for name, info in header.tensors.items()
                }
        except (HTTPError, OSError) as error:
            raise SourceError(f"cannot read the header of {file} of {self.name}: {one_line(error)}") from error


def open_repository(name: str, revision: str | None, token: str | None, small: Collection[str]) -> Repository:
    """Find a repository and download its `small` files (patterns of names). Raises SourceError if that fails."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    token = checked_token(token)
    api = HfApi(token=token)
    try:
        with explain_source_refusals(name, revision):
            files = [file.rfilename for file in api.model_info(name, revision=revision).siblings or ()]
            folder = download(name, revision=revision, token=token, patterns=small)
    except (HTTPError, OSError) as error:
        raise SourceError(f"cannot download {name!r} from the Hub: {one_line(error)}") from error
    return Repository(name, folder.name, folder, files, api)
