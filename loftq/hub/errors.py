"""What the Hub, or the way to it, refuses: turned into errors with the next step."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from loftq.display import one_line
from loftq.errors import CheckpointError, HubError, OptionError, SourceError


@contextmanager
def explain_data(name: str, asked: str) -> Iterator[None]:
    """Turn what reading the data set `name` raises into an OptionError with the next step; it begins with `asked`.

    A folder's name is refused, for the library would read what lies there. Names are expected to have an owner:
    some that have none, such as `text`, are readers to it, which take all that lies in the working directory.
    """
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.errors import HfHubHTTPError

    checked_token(None)
    if Path(name).is_dir():
        raise OptionError(f"{asked}: {name} is a folder here, no data set on the Hub: name its files, or run elsewhere")
    try:
        yield
    except DatasetNotFoundError as error:
        raise OptionError(
            f"{asked}: no such file, and no data set on the Hub that may be read: check the name; if it is private "
            "or gated, ask for access on its page and log in with `hf auth login`"
        ) from error
    except Exception as error:  # of the client, of the network, of any format's reader
        if isinstance(error, HfHubHTTPError) and error.response.status_code == 401:
            raise OptionError(f"{asked}: the Hub refuses the token: log in again with `hf auth login`") from error
        reason = one_line(error.__cause__ or error, 300)
        raise OptionError(f"{asked}: no such file, and cannot be read from the Hub: {reason}") from error


def checked_token(token: str | None) -> str | None:
    """The token, or none for the login's. Raises OptionError for one that no header can hold: the client's own error
    would show it.
    """
    from huggingface_hub import get_token

    token = (token or "").strip() or None
    if not re.fullmatch(r"[!-~]*", token or get_token() or ""):
        raise OptionError("the Hub token holds characters that no token has: copy it again")
    return token


@contextmanager
def explain_source_refusals(repo: str, revision: str | None) -> Iterator[None]:
    """Turn what the Hub answers, but not that it cannot be reached, into a SourceError with the next step."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
        SafetensorsParsingError,
    )

    try:
        yield
    except GatedRepoError as error:
        raise SourceError(
            f"{repo} is gated: accept its terms on its page, then log in with `hf auth login` or pass --token"
        ) from error
    except RevisionNotFoundError as error:
        raise SourceError(f"{repo} has no revision {revision!r}: name a branch, a tag or a commit") from error
    except RepositoryNotFoundError as error:
        raise SourceError(
            f"no model {repo!r} here or on the Hub: check the name; if it is private, "
            "log in with `hf auth login` or pass --token"
        ) from error
    except HFValidationError as error:
        raise SourceError(f"{repo!r} is no folder and no valid model id: {error}") from error
    except SafetensorsParsingError as error:
        raise CheckpointError(f"{repo} holds a damaged safetensors file: {one_line(error)}") from error
    except HfHubHTTPError as error:
        if error.response.status_code != 401:
            raise
        raise SourceError(
            f"the Hub refuses the token with which {repo!r} was asked for: "
            "log in again with `hf auth login`, or pass another --token"
        ) from error


_AGAIN = "The same line again goes on from there: what has arrived is not sent twice"


@contextmanager
def explain_push_refusals(repo_id: str) -> Iterator[None]:
    """Turn what the Hub or the way to it refuses into a HubError with the next step."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError  # type: ignore[attr-defined]

    try:
        yield
    except HfHubHTTPError as error:
        raise HubError(_refusal(repo_id, error)) from error
    except (HTTPError, OSError, RuntimeError) as error:  # the client's ways of sending have errors of each
        cause = error.__cause__
        if isinstance(cause, HfHubHTTPError):
            raise HubError(_refusal(repo_id, cause)) from error
        raise HubError(f"cannot reach {repo_id} on the Hub: {_said(cause or error)}. {_AGAIN}") from error
    except ValueError as error:  # metadata of a card, or an object, that it does not take
        raise HubError(f"the Hub refuses what is sent to {repo_id}: {_said(error)}") from error


def _refusal(repo_id: str, error: Any) -> str:
    said, status = _said(error), error.response.status_code
    if status == 401:
        return "the Hub refuses the token: log in again with `hf auth login`, or pass another --token"
    if status == 403:
        return f"the token may not do this to {repo_id}: {said}: pass --token with one that may write there"
    if status == 409:
        return f"{repo_id} cannot be made or changed as it is: {said}: name another, or try again"
    if status >= 500 or status == 429:
        return f"the Hub does not answer for {repo_id}: {said}. {_AGAIN}"
    return f"the Hub refuses {repo_id}: {said}"


def _said(error: BaseException) -> str:
    """An error in a line, without the queries of addresses, which may be signed."""
    text = getattr(error, "server_message", None) or one_line(error)
    return re.sub(r"\?[^\s'\"]+", "", " ".join(text.split()))
