"""The report: what it measures, by other means, and that its page stands alone.

Covers: cli/report.py, loftq/reporting/charts.py, loftq/reporting/columns.py, loftq/reporting/drawing.py,
loftq/reporting/figures.py, loftq/reporting/measured.py,
loftq/reporting/sections.py, loftq/verbs/report.py.
"""

from __future__ import annotations

import base64
import csv
import io
import json
import re
import shutil
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from conftest import Result
from picos import save_pico
from safetensors.torch import load_file

import loftq
from loftq.calibration import windows
from loftq.errors import ArtifactError, LoftQError, OptionError, OutputError
from loftq.hub.text import read_text
from loftq.reporting import page
from loftq.reporting.figures import without_folders
from loftq.reporting.measured import OUTPUTS, WEIGHTS, Place, measure, places

Run = Callable[..., Result]
VOID = {"meta", "br", "link", "img"}


@pytest.fixture(scope="module")
def made(pico: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Artifacts of one model. Do not write to them."""
    scratch = tmp_path_factory.mktemp("made")
    text = scratch / "text.txt"
    text.write_text(" ".join(read_text("default"))[:40_000], encoding="utf-8")
    known = {"calibration": text, "calibration_tokens": 1024, "sequence_length": 64, "refine": 2, "iters": 2}
    kinds: dict[str, dict[str, Any]] = {
        "qlora": {"method": "qlora"},
        "loftq": {"iters": 3, "alpha": 2},
        "budget": {"bits": 2.5, "iters": 2},
        "calibrated": known,
        "qalora": {"adapter": "qalora", "group_size": 16, "rank": 2, "format": "gptq", "alpha": 1},
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(windows, "MIN_TOKENS", 512)
        return {
            name: loftq.quantize(str(pico), output=scratch / name, quiet=True, **{"rank": 4, **options}).folder
            for name, options in kinds.items()
        }


@pytest.fixture(scope="module")
def text(made: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of all of them."""
    file = tmp_path_factory.mktemp("page") / "page.html"
    assert loftq.report(list(made.values()), html=file) == [file]
    return file.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def two(made: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A page and a picture of two of them."""
    folder = tmp_path_factory.mktemp("two")
    files = (folder / "page.html", folder / "page.png")
    loftq.report([made["loftq"], made["budget"]], html=files[0], png=files[1])
    return files


def rows_of(folder: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((folder / "loftq.json").read_text())["layers"]
    return rows


class Parsed(HTMLParser):
    """A page's tags, what they refer to, its text and its styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.references += [str(value) for name, value in attrs if name in ("src", "href", "xlink:href", "srcset")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (
            ["model.layers.0.mlp.up_proj", "model.layers.0.self_attn.q_proj", "model.layers.10.mlp.up_proj"],
            [Place(0, "up_proj"), Place(0, "q_proj"), Place(1, "up_proj")],
        ),
        (
            ["e.layer.0.attention.output.dense", "e.layer.0.intermediate.dense", "e.layer.0.output.dense"],
            [Place(0, "attention.output.dense"), Place(0, "intermediate.dense"), Place(0, "output.dense")],
        ),
        (
            ["encoder.block.0.layer.0.SelfAttention.q", "decoder.block.0.layer.1.EncDecAttention.q"],
            [Place(0, "SelfAttention.q"), Place(1, "EncDecAttention.q")],
        ),
        (["fc", "model.layers.0.fc2"], [Place(0, "fc"), Place(1, "fc2")]),
    ],
)
def test_places_by_names(names: list[str], expected: list[Place]) -> None:
    assert list(places(names).values()) == expected


def test_errors_of_kinds_and_blocks_are_those_of_their_layers(made: dict[str, Path]) -> None:
    """Oracle: sums over the manifest's rows."""
    (one,) = measure([made["calibrated"]])
    rows = [row for row in rows_of(made["calibrated"]) if row["name"].endswith("up_proj")]
    norms = [row["weight_norm"] ** 2 for row in rows]
    squares = [(row["error"] * row["weight_norm"]) ** 2 for row in rows]
    assert one.of_kind("up_proj", "error") == pytest.approx((sum(squares) / sum(norms)) ** 0.5)
    outputs = [row["output_error"] ** 2 for row in rows]
    assert one.of_kind("up_proj", "output_error") == pytest.approx((sum(outputs) / len(outputs)) ** 0.5)
    assert one.by_depth("error", "up_proj") == {depth: pytest.approx(row["error"]) for depth, row in enumerate(rows)}
    assert list(one.by_depth("plain_error")) == [0, 1]
    assert one.of_kind("up_proj", "no_error") is None


def test_traces_are_those_of_the_layers(made: dict[str, Path]) -> None:
    """Oracle: the manifest's rows; a layer is as long at its last as others go on."""
    qlora, loftq_, calibrated = measure([made["qlora"], made["loftq"], made["calibrated"]])
    rows = rows_of(made["loftq"])
    expected = [[1.0, *(error / row["plain_error"] for error in row["iterations"])] for row in rows]
    assert torch.equal(loftq_.trace(WEIGHTS), torch.tensor(expected, dtype=torch.float64))
    assert torch.equal(qlora.trace(WEIGHTS), torch.ones(14, 1, dtype=torch.float64))
    assert calibrated.trace(OUTPUTS).shape == (14, 3)
    assert not loftq_.has(OUTPUTS)


@pytest.mark.parametrize("name", ["loftq", "qalora", "qlora"])
def test_spectra_are_those_of_the_adapters_product(name: str, made: dict[str, Path]) -> None:
    """Oracle: a full SVD of the product as peft applies it."""
    (one,) = measure([made[name]])
    factors = load_file(made[name] / "loftq_init" / "adapter_model.safetensors")
    config = json.loads((made[name] / "loftq_init" / "adapter_config.json").read_text())
    for row in one.rows:
        a, b = (factors[f"base_model.model.{row['name']}.lora_{part}.weight"].double() for part in "AB")
        if name == "qalora":
            pool = config["qalora_group_size"]
            a = a.repeat_interleave(pool, dim=1) * (a.shape[1] / pool)
        dense = config["lora_alpha"] / config["r"] * b @ a
        expected = torch.linalg.svdvals(dense)[: config["r"]]
        assert torch.allclose(one.spectra[row["name"]].double(), expected, rtol=1e-4, atol=1e-6)
        held, left = expected.square().sum(), (row["error"] * row["weight_norm"]) ** 2
        at = one.rows.index(row)
        assert float(one.captured()[at, -1]) == pytest.approx(float(held / (held + left)), rel=1e-4, abs=1e-9)
        assert float(one.captured()[at, 0]) == 0


def test_labels_tell_artifacts_apart(made: dict[str, Path], tmp_path: Path) -> None:
    labels = [one.label for one in measure(made.values())]
    assert labels == [
        "NF4, rank 4, QLoRA",
        "NF4, rank 4, LoftQ",
        "2.5 bits, rank 4, LoftQ",
        "NF4, rank 4, calibrated",
        "INT4, rank 2, QA-LoRA",
    ]
    again = shutil.copytree(made["loftq"], tmp_path / "again")
    labels = [one.label for one in measure([made["loftq"], again])]
    assert labels == ["NF4, rank 4, LoftQ (loftq)", "NF4, rank 4, LoftQ (again)"]


def test_the_page_stands_alone(made: dict[str, Path], text: str) -> None:
    """Oracle: the standard library's parsers."""
    parsed = Parsed(text)
    others = [reference for reference in parsed.references if not reference.startswith("#")]
    assert [reference.partition(",")[0] for reference in others] == [
        "data:text/csv;base64",
        "data:application/json;base64",
    ]
    assert not {"script", "link", "iframe", "img", "object"} & set(parsed.tags)
    assert not re.search(r"@import|url\((?!#)", text)
    assert "prefers-color-scheme: dark" in text
    plots = re.findall(r"<svg xmlns.*?</svg>", text, re.DOTALL)
    assert plots
    names = [name for plot in plots for name in re.findall(r' id="([^"]+)"', plot)]
    drawn_once = len(set(plots)) == len(plots)
    assert not drawn_once or len(set(names)) == len(names), "a part would be that of another plot"
    for plot in plots:
        ElementTree.fromstring(plot)
        assert not re.search(r"#0708\w\w|#010203|#040506", plot), "a color that stands for another was left"
        assert "var(--ink)" in plot
    assert all(f"var(--s{i})" in text for i in range(len(made)))


def test_the_page_says_what_the_manifests_say(made: dict[str, Path], text: str) -> None:
    text = Parsed(text).text
    for folder in made.values():
        totals = json.loads((folder / "loftq.json").read_text())["totals"]
        for value in (totals["error"], totals["plain_error"]):
            assert f"{value:.4f}" in text
        for row in rows_of(folder):
            assert row["name"] in text
            assert f"{row['error']:.5f}" in text
        assert folder.name in text
        assert str(folder.parent) not in text
    for word in ("By block: outputs", "Bits and rank by layer", "Singular values", "divergence", "group size"):
        assert word in text


def test_numbers_of_an_axis_differ(text: str) -> None:
    """Coordinates lose digits, and what is written in a plot does not. Oracle: the ticks of an axis differ."""
    plots = re.findall(r"<svg xmlns.*?</svg>", text, re.DOTALL)
    by_kind = [plot for plot in plots if "by kind" in plot]
    assert by_kind
    for plot in by_kind:
        numbers = [word for word in re.findall(r"<text[^>]*>([^<]*)</text>", plot) if re.fullmatch(r"[\d.]+", word)]
        assert len(numbers) == len(set(numbers)) > 1


def test_text_has_one_size_at_every_width(text: str) -> None:
    """Plots are not scaled. Oracle: their sizes are those of their view boxes, on wide screens and on narrow ones.

    12 to 13 pixels are 9 to 9.75 points. No plot is wider than 720 pixels, and those of phones are below 358.
    """
    for css, widest in (("wide", 720), ("narrow", 358)):
        plots = re.findall(rf'<div class="{css}">(<svg xmlns.*?</svg>)\s*</div>', text, re.DOTALL)
        assert plots
        for plot in plots:
            width, box = re.search(r'width="(\d+)" height="\d+" viewBox="0 0 ([\d.]+)', plot).groups()  # type: ignore[union-attr]
            assert int(width) <= widest
            assert float(box) * 96 / 72 == pytest.approx(int(width), abs=1)
            sizes = {float(size) for size in re.findall(r"font(?:-size)?: [^;\"]*?([\d.]+)px", plot)}
            assert sizes
            assert all(9 <= size <= 9.75 for size in sizes)


def test_the_best_of_each_width_is_marked_and_named(made: dict[str, Path], tmp_path: Path) -> None:
    """Oracle: the totals of the manifests. Artifacts of other widths are not compared with each other."""
    chosen = [made[name] for name in ("qlora", "loftq", "budget")]
    loftq.report(chosen, html=tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    errors = {folder: json.loads((folder / "loftq.json").read_text())["totals"]["error"] for folder in chosen}
    best = re.findall(r'data-name="error of weights" class="best"><span class="value">([\d.]+)', text)
    assert best == [f"{min(errors[made['qlora']], errors[made['loftq']]):.4f}"]
    conclusion = re.search(r'class="conclusion">(.*?)</p>', text, re.DOTALL)
    assert conclusion is not None
    assert re.fullmatch(
        r"Nearest to full precision: rank 4, LoftQ, with an error of weights of [\d.]+, \d+% of that of plain "
        r"rounding at NF4 and an error of weights of [\d.]+, \d+% of that of plain rounding at 2.5 bits\.",
        conclusion[1],
    )
    assert "<code>loftq report qlora loftq budget --html page.html</code>" in text


def test_the_data_are_those_of_the_manifests(made: dict[str, Path], text: str, run: Run) -> None:
    """The page's own downloads, and what the command prints. Oracle: the manifests."""
    held = {kind: base64.b64decode(code) for kind, code in re.findall(r'href="data:[a-z]+/(\w+);base64,([^"]+)"', text)}
    table = run("report", *made.values(), "--csv")
    assert table.exit_code == 0, table.stderr
    assert held["csv"].decode() == table.stdout
    assert json.loads(held["json"]) == json.loads(run("report", *made.values(), "--json").stdout)
    rows = list(csv.DictReader(io.StringIO(table.stdout)))
    for row, (name, folder) in zip(rows, made.items(), strict=True):
        manifest = json.loads((folder / "loftq.json").read_text())
        assert (row["folder"], float(row["error"])) == (name, manifest["totals"]["error"])
        assert row["torch_version"] == manifest["versions"]["torch"]
    layers = json.loads(held["json"])["artifacts"][1]["layers"]
    assert [layer["error"] for layer in layers] == [row["error"] for row in rows_of(made["loftq"])]


def test_paths_of_this_machine_are_not_shown() -> None:
    assert (
        without_folders("text /home/me/text.txt, x/y and https://a.b/c/d") == "text text.txt, x/y and https://a.b/c/d"
    )


def test_what_is_not_there_is_not_shown(made: dict[str, Path], tmp_path: Path) -> None:
    loftq.report([made["qlora"]], html=tmp_path / "page.html", png=tmp_path / "page.png")
    text = Parsed((tmp_path / "page.html").read_text(encoding="utf-8")).text
    for word in ("By block: outputs", "Bits and rank by layer", "Iterations", "divergence"):
        assert word not in text


@pytest.mark.slow
def test_the_same_artifacts_make_the_same_files(
    made: dict[str, Path], two: tuple[Path, Path], run: Run, tmp_path: Path
) -> None:
    """Made by the function, and again by the command."""
    html, png = tmp_path / "page.html", tmp_path / "page.png"
    result = run("report", made["loftq"], made["budget"], "--html", html, "--png", png)
    assert (result.exit_code, result.stdout, result.stderr) == (0, f"{html}\n{png}\n", "")
    assert html.read_bytes() == two[0].read_bytes()
    picture = png.read_bytes()
    assert picture == two[1].read_bytes()
    assert picture.startswith(b"\x89PNG")


def test_names_are_escaped(made: dict[str, Path], tmp_path: Path) -> None:
    folders = [shutil.copytree(made["loftq"], tmp_path / name) for name in ("<b>&", "$x_1$ <script>")]
    loftq.report(folders, html=tmp_path / "page.html", png=tmp_path / "page.png")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "script" not in Parsed(text).tags
    for plot in re.findall(r"<svg xmlns.*?</svg>", text, re.DOTALL):
        ElementTree.fromstring(plot)
    assert "LoftQ (<b>&)" in Parsed(text).text


@pytest.mark.slow
@pytest.mark.parametrize(("name", "task"), [("bert", "masked-lm"), ("t5", "seq2seq-lm"), ("gpt2", "causal-lm")])
def test_other_families(name: str, task: str, tmp_path: Path) -> None:
    source = save_pico(name, task, tmp_path / "source")
    folder = loftq.quantize(str(source), output=tmp_path / "out", rank=4, iters=1, quiet=True).folder
    loftq.report([folder], html=tmp_path / "page.html", png=tmp_path / "page.png")
    assert "attention" in Parsed((tmp_path / "page.html").read_text(encoding="utf-8")).text.lower() or name == "gpt2"


def test_files_in_the_way_stay(made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = tmp_path / "page.html"
    mine.write_text("mine")
    for target, message in {
        mine: "page.html exists already: add --overwrite",
        tmp_path: "is a folder: name a file",
        tmp_path / "none" / "page.html": "none does not exist: create it first",
    }.items():
        with pytest.raises(OutputError, match=message):
            loftq.report([made["loftq"]], html=target)

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(page, "columns", fail)
        with pytest.raises(OutputError, match=r"cannot write .*page\.html: No space left on device"):
            loftq.report([made["loftq"]], html=mine, overwrite=True)
    assert mine.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [mine]
    loftq.report([made["loftq"]], html=mine, overwrite=True)
    assert mine.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


def test_bad_input(made: dict[str, Path], pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    html = tmp_path / "page.html"
    with pytest.raises(OptionError, match="nothing to write: name a page with --html"):
        loftq.report([made["loftq"]])
    with pytest.raises(OptionError, match="61 folders: a report compares 1 to 60"):
        loftq.report([made["loftq"]] * 61, html=html)
    with pytest.raises(ArtifactError, match=r"has no loftq\.json"):
        loftq.report([made["loftq"], pico], html=html)
    merged = loftq.merge(made["loftq"], to="bf16", output=tmp_path / "merged", check=False, quiet=True).folder
    with pytest.raises(ArtifactError, match="is a merged folder, which has no errors of layers to report"):
        loftq.report([merged], html=html)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(OptionError, match=r"a report needs matplotlib: pip install loftq\[report\]"):
        loftq.report([made["loftq"]], html=html)
    assert not html.exists()


def test_the_command_refuses(run: Run, made: dict[str, Path], two: tuple[Path, Path], tmp_path: Path) -> None:
    assert run("report", made["qlora"], "--html", two[0]).exit_code == 1
    assert run("report", "--html", tmp_path / "page.html").exit_code == 2
    assert issubclass(OptionError, LoftQError)
