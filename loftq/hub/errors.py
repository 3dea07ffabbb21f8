"""Data sets on the Hub, as `datasets` reads them: what a refusal means."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loftq.errors import OptionError
from loftq.hub.source import checked_token, one_line


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
        reason = one_line(error.__cause__ or error)[:300]
        raise OptionError(f"{asked}: no such file, and cannot be read from the Hub: {reason}") from error
