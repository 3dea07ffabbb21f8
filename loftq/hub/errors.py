"""Turns refusals by the Hub and failures of the network into errors that name the next step."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from loftq.display import one_line
from loftq.errors import CheckpointError, HubError, OptionError, SourceError


@contextmanager
def explain_data(name: str, prefix: str) -> Iterator[None]:
    """Turn any error from reading the data set `name` into an OptionError with the next step; it begins with `prefix`.

    Also raises OptionError if `name` is a folder, because `datasets` would read the files in it. Callers must pass a
    name with an owner: `datasets` takes some names without one, such as `text`, for readers, and these read every file
    in the working directory.
    """
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.errors import HfHubHTTPError

    checked_token(None)
    if Path(name).is_dir():
        raise OptionError(
            f"{prefix}: {name} is a folder here, not a data set on the Hub: name its files, or run in another folder"
        )
    try:
        yield
    except DatasetNotFoundError as error:
        raise OptionError(
            f"{prefix}: no such file here, and no such data set on the Hub: check the name; if it is private or gated, "
            "ask for access on its page and log in with `hf auth login`"
        ) from error
    except Exception as error:  # from the client, the network, or the reader of any format
        if isinstance(error, HfHubHTTPError) and error.response.status_code == 401:
            raise OptionError(f"{prefix}: the Hub refuses the token: log in again with `hf auth login`") from error
        reason = one_line(error.__cause__ or error, 300)
        raise OptionError(f"{prefix}: no such file here, and reading it from the Hub failed: {reason}") from error


def checked_token(token: str | None) -> str | None:
    """Return the token, or None to use the token of the login.

    Raises OptionError for a token that an HTTP header cannot hold, because the client's own error would show the token.
    """
    from huggingface_hub import get_token

    token = (token or "").strip() or None
    if not re.fullmatch(r"[!-~]*", token or get_token() or ""):
        raise OptionError("the Hub token contains invalid characters: copy it again")
    return token


@contextmanager
def explain_source_refusals(repo: str, revision: str | None) -> Iterator[None]:
    """Turn a refusal by the Hub into a SourceError with the next step. Network failures pass unchanged."""
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
        raise SourceError(f"{repo!r} is neither a folder nor a valid model id: {error}") from error
    except SafetensorsParsingError as error:
        raise CheckpointError(f"{repo} holds a damaged safetensors file: {one_line(error)}") from error
    except HfHubHTTPError as error:
        if error.response.status_code != 401:
            raise
        raise SourceError(
            f"the Hub refuses the token for {repo!r}: log in again with `hf auth login`, or pass another --token"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, OSError):  # the network's errors may derive from ValueError too
            raise
        raise SourceError(_not_understood(repo, error)) from error


def _not_understood(repo: str, error: Exception) -> str:
    return (
        f"the answer of the Hub about {repo} cannot be understood ({type(error).__name__}: {one_line(error, 120)}): "
        "try again later, or check HF_ENDPOINT"
    )


_CONTINUE = "Run the same command again to continue: files that have arrived are not sent twice"


@contextmanager
def explain_push_refusals(repo_id: str) -> Iterator[None]:
    """Turn a refusal by the Hub or a failure of the network into a HubError with the next step."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError  # type: ignore[attr-defined]

    try:
        yield
    except HfHubHTTPError as error:
        raise HubError(_refusal(repo_id, error)) from error
    except (HTTPError, OSError, RuntimeError) as error:  # each way in which the client sends files has its own errors
        cause = error.__cause__
        if isinstance(cause, HfHubHTTPError):
            raise HubError(_refusal(repo_id, cause)) from error
        raise HubError(f"cannot reach {repo_id} on the Hub: {_message(cause or error)}. {_CONTINUE}") from error
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise HubError(_not_understood(repo_id, error)) from error
    except ValueError as error:  # the Hub rejects the metadata of a card, or an object
        raise HubError(f"the Hub refuses the files for {repo_id}: {_message(error)}") from error


def _refusal(repo_id: str, error: Any) -> str:
    message, status = _message(error), error.response.status_code
    if status == 401:
        return "the Hub refuses the token: log in again with `hf auth login`, or pass another --token"
    if status == 403:
        return f"the token has no permission for this on {repo_id}: {message}: pass a --token with write access"
    if status == 409:
        return f"{repo_id} cannot be created or changed now: {message}: name another repository, or try again"
    if status >= 500 or status == 429:
        return f"the Hub cannot serve {repo_id} now: {message}. {_CONTINUE}"
    return f"the Hub refuses the push to {repo_id}: {message}"


def _message(error: BaseException) -> str:
    """The message of an error in one line. Queries of addresses are removed, because they may hold a signature."""
    text = getattr(error, "server_message", None) or one_line(error)
    return re.sub(r"\?[^\s'\"]+", "", " ".join(text.split()))
