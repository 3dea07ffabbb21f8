"""What a person is shown. Oracle: the lines, written out by hand."""

from __future__ import annotations

import pytest

from loftq.display import code, code_block, columns, few_of, key_values, line_width, markdown, one_line, size, visible


def test_values_begin_in_one_column() -> None:
    rows = [("folder", "out"), ("bits per weight", "4.127"), ("note", "a note that is long")]
    shown = "folder           out\nbits per weight  4.127\nnote             a note that is long"
    assert key_values(iter(rows)) == shown


def test_columns_are_as_wide_as_their_widest_cell() -> None:
    rows = [("type", "bits", "note"), ("nf4", "4.127", ""), ("int", "4", "stock")]
    assert columns(rows) == "type  bits   note\nnf4   4.127\nint   4      stock"
    assert columns(rows[:2], numbers=True) == "type   bits  note\nnf4   4.127"
    assert columns([]) == ""


@pytest.mark.parametrize(
    ("width", "shown"),
    [
        (40, "name  text\na     one two three\nb     four"),
        (14, "name  text\na     one two\n      three\nb     four"),
        (11, "name  text\na     one\n      two\n      three\nb     four"),
    ],
)
def test_columns_are_wrapped_between_words(width: int, shown: str) -> None:
    token = line_width.set(width)
    try:
        assert columns([("name", "text"), ("a", "one two three"), ("b", "four")]) == shown
        long = columns([("a" * 30, "b" * 30)])
        assert "".join(long.split()).count("a") == 30
        assert max(map(len, long.splitlines())) <= max(width, 2 * 8 + 2)
    finally:
        line_width.reset(token)


def test_an_error_is_one_line() -> None:
    assert one_line(ValueError("two\n  lines")) == "two lines"
    assert one_line(ValueError("two\n  lines"), 5) == "two l"
    assert one_line(ValueError()) == "ValueError"


@pytest.mark.parametrize(
    ("nbytes", "shown"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (15e8, "1.5 GB"), (2e12, "2.0 TB")]
)
def test_sizes_are_decimal(nbytes: float, shown: str) -> None:
    assert size(nbytes) == shown


def test_a_few_names_stand_for_many() -> None:
    assert few_of(["a", "b", "c"]) == "a, b, c"
    assert few_of(["a", "b", "c", "d", "e"]) == "a, b, c and 2 more"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain ‖W‖ − ü 漢字 🙂", "plain ‖W‖ − ü 漢字 🙂"),
        ("\x1b]0;title\x07\x1b[31mred", r"\x1b]0;title\x07\x1b[31mred"),
        ("a\nb\tc\rd", r"a\nb\tc\rd"),
        ("\x9b31m\x7f\x00", r"\x9b31m\x7f\x00"),
        ("a\u202eb\u2066c\u200bd\ufeffe\u2028f", r"a\u202eb\u2066c\u200bd\ufeffe\u2028f"),
        ("file\udce9", r"file\udce9"),
        ("\U000e0041tag", r"\U000e0041tag"),
    ],
)
def test_what_a_terminal_would_obey_is_shown_as_an_escape(text: str, shown: str) -> None:
    assert visible(text) == shown
    assert visible(shown) == shown
    assert columns([(text, "x")]) == f"{shown}  x"


def test_lines_stay_lines_where_they_are_meant() -> None:
    assert visible("a\n\tb\x1b\n", lines=True) == "a\n\tb\\x1b\n"


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.q_proj"),
        ("layers.*.q", r"layers.\*.q"),
        ("a | b", r"a \| b"),
        ("<img src=x onerror=y>&amp;", "&lt;img src=x onerror=y&gt;&amp;amp;"),
        ("![x](https://a.b/c)", r"!\[x\](https:&#47;/a.b/c)"),
        ("```\n# title", r"\`\`\`\\n# title"),
        ("_a_ **b** `c`", r"\_a\_ \*\*b\*\* \`c\`"),
    ],
)
def test_a_text_in_a_card_is_shown_as_it_is(text: str, escaped: str) -> None:
    assert markdown(text) == escaped


def test_code_in_a_card_ends_where_it_ends() -> None:
    assert code("a") == "`a`"
    assert code("`a") == "`` `a ``"
    assert code_block("x\n```\ny\x1b") == "````\nx\n```\ny\\x1b\n````"
