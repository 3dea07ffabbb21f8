"""What a name of a model stands for: a folder here, or a repository on the Hub, `OWNER/NAME` or `OWNER/NAME@REVISION`.

A folder with that name comes first, also if the name has the form of an id.
"""

from __future__ import annotations

from pathlib import Path

from loftq.errors import OptionError, SourceError

_OF_PATHS = (".", "/", "~")  # how the name of a folder may begin, but not that of a repository


def find_folder(model: str, revision: str | None = None) -> Path | None:
    """Return the folder that a name stands for, or None if the name can only be an id on the Hub.

    Raises SourceError for any other name, and OptionError if a `revision` is given for a folder.
    """
    try:
        folder = Path(model).expanduser()
        is_folder, exists = folder.is_dir(), folder.exists()
    except (OSError, RuntimeError) as error:  # a too long name, a missing permission, an unknown user after ~
        raise SourceError(f"cannot look for {model}: {getattr(error, 'strerror', None) or error}") from error
    if is_folder:
        if revision is not None:
            raise OptionError(
                f"--revision {revision} applies to models on the Hub, and {model} is a folder: leave the option out"
            )
        return folder
    if exists:
        raise SourceError(f"{model} is a file: expected a checkpoint folder or the id of a model on the Hub")
    if model.startswith(_OF_PATHS) or model.partition("@")[0].count("/") > 1:
        raise SourceError(f"no such folder: {model}: check the path, or name a model on the Hub")
    return None


def repository_of(name: str, revision: str | None = None) -> tuple[str, str | None]:
    """The id of a repository and its revision, from `OWNER/NAME`, or from `OWNER/NAME@REVISION`.

    Raises OptionError if both the name and `revision` name one, and they differ.
    """
    repo, sign, named = name.partition("@")
    if not sign:
        return name, revision
    if not named:
        raise OptionError(f"{name}: a branch, a tag or a commit is missing after the @: name one, or leave the @ out")
    if revision not in (None, named):
        raise OptionError(f"--revision {revision}: {name} names another revision: leave one of the two out")
    return repo, named


def subfolder_of(name: str) -> tuple[str, str] | None:
    """The repository, with its revision, and the folder in it, from `OWNER/NAME/FOLDER`; None for any other name."""
    path, sign, revision = name.partition("@")
    owner, *rest = path.split("/")
    if len(rest) < 2 or name.startswith(_OF_PATHS) or Path(owner).exists():
        return None
    return f"{owner}/{rest[0]}{sign}{revision}", "/".join(rest[1:])
