"""The page's content: what it shows, what it says is missing, and that no name in it can do harm."""

import base64
import csv
import io
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ubgen.core.errors import UserError
from ubgen.core.stage import Stage
from ubgen.report.directories import find
from ubgen.report.page import _encoded_pictures, render, write_report
from ubgen.report.parts import Picture, Row, Section

VOID = {"meta", "link", "img", "br", "circle", "line", "rect", "polyline"}


class Page(HTMLParser):
    """Elements with their attributes, headings, tables as rows of cells, and all text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.headings: list[tuple[str, str]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.texts: list[str] = []
        self._open: list[str] = []
        self._rows: list[list[str]] = []
        self._caption = ""
        self.feed(html)
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)
        if tag in ("h1", "h2", "h3"):
            self.headings.append((tag, ""))
        elif tag == "caption":
            self._caption, self._rows = "", []
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag in VOID:
            return
        assert self._open.pop() == tag, "tags are not nested"
        if tag == "table":
            assert self._caption not in self.tables
            self.tables[self._caption] = self._rows

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] in ("style", "script"):
            return
        self.texts.append(data)
        if "caption" in self._open:
            self._caption += data
        elif {"td", "th"} & set(self._open):
            self._rows[-1][-1] += data.strip("\n")
        elif self._open and self._open[-1] in ("h1", "h2", "h3"):
            self.headings[-1] = self.headings[-1][0], data


@pytest.fixture(scope="module")
def parsed(page: Path) -> Page:
    return Page(page.read_text(encoding="utf-8"))


def test_every_stage_has_its_section_and_figures(parsed: Page) -> None:
    sections = [text for level, text in parsed.headings if level == "h2"]
    assert sections == [
        "What was run",
        "Fine-tuning",
        "Export",
        "Synthesis",
        "Measures",
        "Pre-training",
        "Evaluation",
    ]
    tables = parsed.tables
    assert [row[:2] for row in tables["Directories"][1:]][:2] == [
        ["train", "ubgen-train"],
        ["engine", "ubgen-export"],
    ]
    assert ["loss", "40", "5.9", "2", "2", "5.9"] in tables["Metrics of train"]
    assert ["top1", "1", "55.5", "55.5", "55.5", "55.5"] in tables["Metrics of backbone"]
    assert tables["Parity of the networks of engine"][1][:4] == ["unet", "onnxruntime", "float32", "68"]
    assert ["PSNR (dB)", "86.3"] in tables["Parity of the whole pipeline of engine"]
    assert ["Q-Align score", "16", "2.5", "1.118", "1", "2.5", "4"] in tables["Scores of tuned"]
    assert ["<b>blank</b>", "1"] in tables["Rejected images of tuned"]
    assert tables["Where the time of tuned went"][1][:2] == ["decode", "3.0"]
    assert ["measures, diversity, rke", "3.25 (3 to 3.5)"] in tables["Measures of datasets"]
    assert [row[0] for row in tables["Measures of datasets"]][-1] == "quality, mean"
    assert not any(row[0] == "class counts" for row in tables["Measures of datasets"])
    assert tables["Measures of the classes of measures"][1][1:] == ["c", "4", "2 (1.5 to 2.5)", "0.5"]
    assert tables["Classes of two meanings in measures"][1][1:3] == ["<b>bird</b>", "0.25"]
    assert ["rollout.steps", "25"] in tables["Settings of train"]


def test_the_papers_rows_are_in_a_table_of_their_own(parsed: Page) -> None:
    measured = parsed.tables["Transfer: top-1 accuracy of a linear classifier"]
    assert measured == [
        ["", "eval-base", "eval-tuned"],
        ["aircraft", "40.0 (37.0 to 43.0)", "60.0 (57.0 to 63.0)"],
    ]
    papers = [
        caption for caption in parsed.tables if caption.startswith("The paper's figures, not measured here")
    ]
    assert papers
    assert not any(
        cell.startswith("eval-") for caption in papers for row in parsed.tables[caption] for cell in row
    )
    differences = next(
        rows for caption, rows in parsed.tables.items() if "differences to eval-base" in caption
    )
    assert differences[1][1].startswith("+20.0")


def test_names_are_text_and_nothing_else(page: Path, parsed: Page) -> None:
    classes = parsed.tables["Classes of tuned"]
    assert [row[0] for row in classes[1:4]] == [
        "<script>harmed = true</script>",
        '"><img src=x onerror="harmed=true">',
        "=HYPERLINK(1)",
    ]
    assert sum(tag == "script" for tag, _ in parsed.elements) == 1
    assert not any(name.startswith("on") for _, attributes in parsed.elements for name in attributes)
    assert "About <script>harmed = true</script>" in "".join(parsed.texts)
    assert page.read_text().count("<script>") == 1


def test_nothing_is_asked_of_a_host(parsed: Page) -> None:
    for tag, attributes in parsed.elements:
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:", "#")), (tag, value)
    policy = next(a for t, a in parsed.elements if t == "meta" and a.get("http-equiv"))
    assert str(policy["content"]).startswith("default-src 'none'; img-src data:;")


def test_tables_and_pictures_say_what_they_are(parsed: Page) -> None:
    images = [attributes for tag, attributes in parsed.elements if tag == "img"]
    assert len(images) > 8
    assert all(len(attributes["alt"] or "") > 10 for attributes in images)
    charts = [attributes for tag, attributes in parsed.elements if tag == "svg"]
    assert any("Loss. loss: first 5.9, last 2, lowest 2, highest 5.9" in str(a["aria-label"]) for a in charts)
    few = next(
        str(a["aria-label"]) for a in charts if "Few-shot accuracy on aircraft" in str(a["aria-label"])
    )
    assert "eval-tuned: first 6.5, last 60.5" in few
    levels = [int(level[1]) for level, _ in parsed.headings]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))


def test_each_table_is_a_download(parsed: Page) -> None:
    links = [attributes for tag, attributes in parsed.elements if tag == "a" and "download" in attributes]
    assert len(links) == len(parsed.tables)
    link = next(attributes for attributes in links if attributes["download"] == "classes-of-tuned.csv")
    content = base64.b64decode(str(link["href"]).partition("base64,")[2]).decode()
    rows = list(csv.reader(io.StringIO(content)))
    assert rows[0][:3] == ["class", "id", "images"]
    assert rows[1][0] == "<script>harmed = true</script>"
    assert rows[3][0] == "'=HYPERLINK(1)"  # a spreadsheet would run it
    hashes = next(attributes for attributes in links if attributes["download"] == "directories.csv")
    assert re.search(
        r"sha256:[0-9a-f]{64}", base64.b64decode(str(hashes["href"]).partition("base64,")[2]).decode()
    )


def test_pairs_show_only_images_of_the_same_noise(
    runs: Path, parsed: Page, write_dataset: Callable[..., Path], tmp_path: Path
) -> None:
    assert ("h3", "Before and after, from the same noise") in parsed.headings
    alts = [str(attributes["alt"]) for tag, attributes in parsed.elements if tag == "img"]
    pairs = [alt for alt in alts if "above of base, below of tuned" in alt]
    assert len(pairs) == 4
    assert pairs[0].startswith("3 images of <script>")  # one was drawn again in one of them
    assert pairs[2].startswith("4 images of =HYPERLINK(1)")
    other = write_dataset(tmp_path / "other", ["a", "b"], lora="sha256:b", seed=1)
    assert "Before and after" not in render(find([runs / "base", other]), "r")


def test_what_is_missing_or_not_shown_is_named(runs: Path, tmp_path: Path) -> None:
    unfinished = Stage(tmp_path / "begun", "train", {})
    with unfinished.hold():
        unfinished.begin()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/manifest.json").write_text("{")
    html = render(find([runs / "train", *sorted(tmp_path.iterdir())]), "r")
    page = Page(html)
    rows = dict(page.tables["Paths that are not shown"][1:])
    assert rows["begun"] == "unfinished (no manifest.json)"
    assert rows["foreign"] == "not a directory of ubgen"
    assert "not valid JSON" in rows["broken"]
    text = "".join(page.texts)
    assert "export (ubgen-export), synthesis (ubgen-synth)" in text
    assert "fine-tuning (ubgen-train)" not in text


def test_a_directory_of_another_version_is_a_line_and_not_the_end(runs: Path, tmp_path: Path) -> None:
    with Stage(tmp_path / "odd", "synth", {}).hold() as stage:
        stage.begin()
        stage.finish({}, stats={"scores": ["quality"]})
    page = Page(render(find([runs / "base", tmp_path / "odd"]), "r"))
    assert dict(page.tables["Paths that are not shown"][1:])["odd"].startswith(
        "its files are not what this version"
    )
    assert "Scores of base" in page.tables


def test_a_directory_of_directories_stands_for_them(runs: Path) -> None:
    assert [d.name for d in find([runs]).finished] == [d.name for d in find(sorted(runs.iterdir())).finished]


def test_directories_of_the_same_name_are_told_apart(
    write_dataset: Callable[..., Path], tmp_path: Path
) -> None:
    for name in ("one", "two"):
        write_dataset(tmp_path / name / "dataset", ["a"])
    found = find([tmp_path / "one/dataset", tmp_path / "two/dataset", tmp_path / "one/dataset"])
    assert [directory.name for directory in found.finished] == ["one/dataset", "two/dataset"]


def test_wrong_calls_end_with_one_line(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing-here: no such file"):
        write_report([tmp_path / "nothing-here"], tmp_path / "r.html", "r")
    with pytest.raises(UserError, match="no finished stage directory"):
        write_report([tmp_path], tmp_path / "r.html", "r")
    with pytest.raises(UserError, match="in a directory that exists"):
        write_report([runs], tmp_path / "no/r.html", "r")
    (tmp_path / "notes.html").write_text("mine")
    with pytest.raises(UserError, match="is not a report"):
        write_report([runs], tmp_path / "notes.html", "r")
    assert (tmp_path / "notes.html").read_text() == "mine"
    assert not (tmp_path / "r.html").exists()


def test_an_earlier_report_is_replaced(runs: Path, tmp_path: Path) -> None:
    for title in ("first", "second"):
        write_report([runs / "engine"], tmp_path / "r.html", title)
    assert "<h1>second</h1>" in (tmp_path / "r.html").read_text()


def test_damaged_files_leave_a_sentence(write_dataset: Callable[..., Path], tmp_path: Path) -> None:
    out = write_dataset(tmp_path / "dataset", ["a"])
    (out / "contact-sheet.png").write_bytes(b"no picture")
    (out / "rejections.jsonl").write_text("{")
    (out / "classes.json").unlink()
    text = "".join(Page(render(find([out]), "r")).texts)
    assert "the picture cannot be shown" in text
    assert "rejections.jsonl cannot be read" in text
    assert "classes.json is missing" in text


def test_a_hundred_classes_stay_under_three_megabytes(
    write_dataset: Callable[..., Path], tmp_path: Path
) -> None:
    out = write_dataset(tmp_path / "dataset", [f"class {i}" for i in range(100)], images=1)
    noise = np.random.default_rng(0).integers(
        0, 256, (2400, 600, 3), dtype=np.uint8
    )  # worse than any real sheet
    Image.fromarray(noise).save(out / "contact-sheet.png")
    html = render(find([out, *(tmp_path / "none").glob("*")]), "r")
    assert len(Page(html).tables["Classes of dataset"]) == 101
    assert len(html.encode()) < 3_000_000


def test_large_pictures_make_room_and_small_ones_stay(
    write_dataset: Callable[..., Path], tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (60, 100, 3), dtype=np.uint8))
    large = Image.fromarray(rng.integers(0, 256, (200, 400, 3), dtype=np.uint8))
    pictures = [Picture(small, "s", "small"), *(Picture(large, "l", "large") for _ in range(3))]
    made = _encoded_pictures([Section("a", [pictures[0], Row(pictures[1:])])], most=150_000)
    sizes = [len(made[id(picture)].address) for picture in pictures]
    assert sum(len(picture.encoded(330_000).address) for picture in pictures) > 150_000
    assert sum(sizes) <= 150_000
    assert made[id(pictures[0])] == pictures[0].encoded(330_000)
    assert min(sizes[1:]) > sizes[0]


def test_colours_have_enough_contrast() -> None:
    """WCAG 2.2, 1.4.3: 4.5 for text."""
    css = (Path(render.__code__.co_filename).parent / "page.css").read_text()
    themes = re.findall(r":root \{(.*?)\}", css, re.DOTALL)
    assert len(themes) == 2
    for theme in themes:
        colours = dict(re.findall(r"--(\w+): (#\w{6})", theme))
        for text in ("fore", "soft", "link"):
            for ground in ("back", "band"):
                assert _contrast(colours[text], colours[ground]) >= 4.5, (text, ground)


def _contrast(one: str, two: str) -> float:
    light, dark = sorted((_luminance(one), _luminance(two)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def _luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_stats_without_figures_are_said_to_be_empty(tmp_path: Path) -> None:
    (tmp_path / "stats.json").write_text(json.dumps({"class_counts": [1]}))
    assert "stats.json holds no figure" in render(find([tmp_path]), "r")
