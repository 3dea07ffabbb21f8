"""The documentation: generated pages are current, the README is short, and links lead somewhere.

The oracle of the pages is the code itself: `docs/generate.py` writes them again. That of links are files and headings.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TypedDict, Unpack

import click
import pytest

from loftq.planning.synonyms import OPTIONS, SYNONYMS

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    path
    for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("*/README.md")]
    if "_build" not in path.parts
)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


class Keywords(TypedDict, total=False):
    """What `sample` takes by name."""

    rank: int
    note: str | None


def sample(folder: str, *, quiet: bool = False, **settings: Unpack[Keywords]) -> None:
    """A function whose keywords are declared elsewhere."""


@pytest.fixture(scope="module")
def generator() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "docs"))
        import generate

        yield generate
    for name in ("generate", "signatures"):
        sys.modules.pop(name, None)


def prose(text: str) -> str:
    """Markdown without its blocks of code."""
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", prose(page.read_text(encoding="utf-8")), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_generated_pages_are_current(generator: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert generator.main(["--check"]) == 0, capsys.readouterr().err


def test_a_stale_page_is_named(
    generator: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(generator, "REFERENCE", tmp_path / "reference")
    monkeypatch.setattr(generator, "PAGES", {"one.md": lambda: "1\n", "two.md": lambda: "2\n"})
    assert generator.main([]) == 0
    assert generator.main(["--check"]) == 0
    (tmp_path / "reference" / "two.md").write_text("3\n")
    assert generator.main(["--check"]) == 1
    message = capsys.readouterr().err
    assert "two.md is not current" in message
    assert "one.md" not in message
    assert (tmp_path / "reference" / "two.md").read_text() == "3\n"


def test_options_are_listed_by_group_where_they_name_one(generator: ModuleType) -> None:
    options = [click.Option([f"--{name}"], help=f"The {name}.") for name in ("rank", "bits", "quiet")]
    for option, group in zip(options, ("adapter", "adapter", "run"), strict=True):
        option.group = group  # type: ignore[attr-defined]
    text = generator._command(click.Context(click.Command("build", params=list(options)), info_name="build"))
    adapter, run = text.index("**adapter**"), text.index("**run**")
    assert adapter < text.index("| `--rank TEXT` | The rank. |") < text.index("`--bits TEXT`") < run
    assert run < text.index("`--quiet TEXT`")


def test_keywords_of_a_typed_dict_are_listed(generator: ModuleType) -> None:
    function = generator.PublicFunction("loftq.sample", sample)
    assert function.keywords == ["folder", "quiet", "rank", "note"]
    assert function.text.splitlines()[1:-1] == [
        "    folder: str,",
        "    *,",
        "    quiet: bool = False,",
        "    rank: int,",
        "    note: str | None,",
    ]


def test_every_public_name_and_command_has_its_section(generator: ModuleType) -> None:
    api, commands = (ROOT / "docs" / "reference" / name for name in ("api.md", "commands.md"))
    assert {f"loftq{name}".lower() for name in generator.loftq.__all__} <= anchors(api)
    assert {f"loftq-{name}" for name in generator.cli.list_commands(None)} <= anchors(commands)


def test_commands_on_the_pages_have_the_options_that_they_show(generator: ModuleType) -> None:
    options = {
        context.command_path: {
            name for option in context.command.params for name in (*option.opts, *option.secondary_opts, "--help")
        }
        for context in generator._contexts(generator._root())
    }
    unknown, checked = [], 0
    for page in PAGES:
        for command, rest in re.findall(r"(loftq (?:zoo )?[a-z]+)([^\n`]*)", page.read_text(encoding="utf-8")):
            for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", rest) if command in options else ():
                checked += 1
                other = command == "loftq train" and option[2:].replace("-", "_") in (*SYNONYMS, *OPTIONS)
                if option.replace("_", "-") not in options[command] and not other:
                    unknown.append(f"{page.name}: {command} {option}")
    assert not unknown
    assert checked > 50


def test_the_readme_fits_a_front_page() -> None:
    assert len((ROOT / "README.md").read_bytes()) <= 8192


def test_the_example_of_finding_a_message_finds_it() -> None:
    """The README shows how to find the file of an error message; oracle: that file."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    example = re.search(r'`grep -rn "([^"]+)" loftq cli`.*?in\s`([\w/]+\.py)`', readme, flags=re.DOTALL)
    assert example is not None
    words, name = example.groups()
    assert words in (ROOT / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_relative_links_lead_somewhere(page: Path) -> None:
    broken = []
    for link in LINK.findall(prose(page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken, f"{page.relative_to(ROOT)} links to {', '.join(broken)}"
