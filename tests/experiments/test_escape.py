"""Words from run folders are plain text in every format, whatever is in them."""

import html
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import matplotlib.pyplot as plt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token

from common.text import markdown_table
from experiments.claims.verdict import SUPPORTED, Verdict
from experiments.escape import escape_latex, escape_markdown, escaped_list, escaped_table, one_visible_line, visible
from experiments.paper.claims import PAPER_CLAIMS
from experiments.paper.render import fill_table, latex, markdown
from experiments.paper.report import report, verdicts_markdown
from experiments.paper.tables_and_figures import TABLES
from experiments.run.plot import draw_run
from experiments.run.style import image
from tests.experiments.written_runs import modify
from tests.helpers import CHECKOUT

HOSTILE = [
    "\\input{/etc/passwd}", "a|b\nc", "`rm -rf`", "[x](http://evil.example)", "![x](y.png)", "<script>x</script>",
    "&lt;b&gt;", "**bold** __b__ *i* _i_ ~~s~~", "$x^2$ \\(y\\)", "# title", "- item", "1. item", "1) item", "---",
    "===", "> quote", "    code", "https://evil.example www.evil.example", "<http://evil.example>", "\x1b[31mred\x07",
    "a\ud800b", "\u202egnp.exe", "a\x00b\x7f", "%$&#_{}~^\\", "a\\", "\\\\", "]]>", "--><b>", "\"'", "a\r\n\r\nb",
    "\u2028\u2029", "```\nx\n```", "[^1]: x", "\\begin{x}", "a & b \\\\ c", "[2cm]", "<!--", "{{ 7 * 7 }}", "{% raw %}",
    "$\\frac$", "$", "snake_case_name", "+", "+ item", "max_grad_norm -0.5 = 1.0", "", " ", "#", "2.5", "12.", "=",
    "a:b c://d",
]  # fmt: skip
TEXTS = st.text(st.sampled_from("\\`*_[]<>|~$&#+-=.:/!(){}^%1 \n\tax\x1b\u202e\ud800w")) | st.sampled_from(HOSTILE)
MANY = settings(derandomize=True, database=None, deadline=None, max_examples=300, suppress_health_check=[*HealthCheck])

RESULTS = CHECKOUT / "experiments" / "results"
RECORDED_TABLES = [*sorted(RESULTS.glob("labs/*/report.md")), *sorted(RESULTS.glob("micro/tables/*.md"))]

GFM = MarkdownIt("commonmark").enable(["table", "strikethrough"])


def shown_by_markdown(source: str) -> str:
    """The text of the only paragraph or cell of a source, which must have no other elements."""
    return "".join(shown_by_inline(token) for token in GFM.parse(source) if token.type == "inline")


def shown_by_inline(token: Token) -> str:
    texts = token.children or []
    assert {child.type for child in texts} <= {"text", "text_special"}, token.content
    return "".join(child.content for child in texts)


@pytest.mark.parametrize("text", HOSTILE)
def test_markdown_shows_hostile_text_as_it_is(text):
    check_markdown(text)


@given(text=TEXTS)
@MANY
def test_markdown_shows_any_text_as_it_is(text):
    check_markdown(text)


def check_markdown(text: str) -> None:
    escaped = escape_markdown(text)
    assert "\n" not in escaped
    escaped.encode()
    assert shown_by_markdown(escaped) == one_visible_line(text).strip()
    rows = [line for line in GFM.parse(f"| a | b |\n| --- | --- |\n| {escaped} | z |\n") if line.type == "td_open"]
    assert len(rows) == 2, "a table has as many cells as before"
    assert not re.search(r"https?://|www\.", escaped), "no bare links"


@given(data=st.data())
@MANY
def test_table_and_list_show_any_text_as_it_is(data):
    width = data.draw(st.integers(1, 4))
    header, *rows = data.draw(st.lists(st.lists(TEXTS, min_size=width, max_size=width), min_size=1, max_size=4))
    left = data.draw(st.integers(0, width))
    tokens = GFM.parse(escaped_table(header, rows, left))
    assert [token.type for token in tokens].count("table_open") == 1 and tokens[-1].type == "table_close"
    cells = [token for token in tokens if token.type in ("th_open", "td_open")]
    shown = [shown_by_inline(token) for token in tokens if token.type == "inline"]
    assert shown == [one_visible_line(text).strip() for row in (header, *rows) for text in row]
    aligned = [cell.attrs.get("style") for cell in cells]
    assert aligned == [
        None if column < left else "text-align:right" for _ in (header, *rows) for column in range(width)
    ]
    texts = [text for text in header if text.strip()]
    items = [token for token in GFM.parse(escaped_list(texts)) if token.type == "inline"]
    assert [*map(shown_by_inline, items)] == [one_visible_line(text).strip() for text in texts]


@pytest.mark.parametrize("file", RECORDED_TABLES, ids=lambda file: str(file.relative_to(RESULTS)))
def test_recorded_tables_have_the_form(file):
    """A report that is made again differs from the recorded one in words and numbers only."""
    tables = re.findall(r"(?:^\|.*\n)+", file.read_text(), re.M)
    assert tables
    for table in tables:
        header, _, *rows = ([cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines())
        assert markdown_table(header, rows) == table.rstrip("\n")


@given(text=TEXTS)
@MANY
def test_latex_has_only_commands_of_ours(text):
    escaped = escape_latex(text)
    words = r"\\textbackslash\{\}|\\textasciicircum\{\}|\\textasciitilde\{\}|\\text(?:less|greater|bar)\{\}"
    rest = re.sub(rf"{words}|\\[{{}}$&#_%]|\{{[\[\]]\}}|\$\\pm\$", "", escaped)
    assert not set(rest) & set("\\{}$&#^_%~[]<>|\n\r\t")
    assert all(character.isprintable() for character in rest)


def test_escapes_leave_ordinary_text_alone():
    for text in ("max_grad_norm 1.0", "seeds 0, 1, 2", "-0.500 ± 0.1", "2.5 (1 of 3 seeds)", "text sotu: a, b; c"):
        assert escape_markdown(text) == visible(text) == text
    assert escape_latex("5.1 ± 0.1 nats") == r"5.1 $\pm$ 0.1 nats"
    assert visible("a\tb\nc\x1b\ud800") == "a\tb\nc\\x1b\\ud800"


class Elements(HTMLParser):
    """The names of a page's elements, the targets of its links, and its text."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.names: set[str] = set()
        self.targets: list[str] = []
        self.text = ""

    def handle_starttag(self, tag, attrs):
        self.names.add(tag)
        self.targets += [value for name, value in attrs if name == "href"]

    def handle_data(self, data):
        self.text += data


def with_words(everything, word: str):
    """The runs, with a word in each text of their files that tables and the report print."""

    def change(spec, seed, run):
        config = {
            **run.config,
            "model": {**run.config["model"], "name": word},
            "paper": {**run.config["paper"], "scale": word},
            "data": {**run.config["data"], "name": word, "corruption": {"steps": [80], "kind": word}},
        }
        start = {"commit": word, "versions": {word: word}, "device": word}
        return run._replace(config=config, starts=[start], result={**run.result, "data_fingerprint": word})

    few = {key: run for key, run in everything.runs.items() if key[1] == 0}
    return modify(everything._replace(runs=few), change)._replace(warnings=[f"{word} is excluded"])


HOSTILE_WORD = "\\input{/etc/passwd}<script>|`x`\n\n# h [l](http://e) $\\frac$ {{7*7}} \x1b\ud800 </code> _i_ *b* 50%"


def test_words_of_a_run_are_text_in_tables_verdicts_and_the_report(everything):
    collection = with_words(everything, HOSTILE_WORD)
    filled = fill_table(TABLES["table3"], collection)
    source = markdown(filled)
    kinds = {child.type for token in GFM.parse(source) for child in token.children or ()}
    assert kinds <= {"text", "text_special", "strong_open", "strong_close"} and source.count("\n# h") == 0
    plain = escape_latex(HOSTILE_WORD)
    assert f"fingerprint {plain}" in latex(filled) and "\\input" not in latex(filled)
    verdicts = [Verdict(PAPER_CLAIMS[0], SUPPORTED, [f"with {HOSTILE_WORD}"], runs=[HOSTILE_WORD], scale=HOSTILE_WORD)]
    text = verdicts_markdown(collection, verdicts, "micro")
    assert text.count(escape_markdown(HOSTILE_WORD)) >= 4 and "\n# h" not in text
    page = report(collection, verdicts, [TABLES["table3"]], {}, [], "micro", [f"python {HOSTILE_WORD}"], "")
    page.encode()
    elements = Elements()
    elements.feed(page)
    assert "script" not in elements.names and page.count("<code>") == page.count("</code>") > 1
    assert elements.targets and all(re.fullmatch("#(claim|run)-[0-9]+", target) for target in elements.targets)
    assert f"with {visible(HOSTILE_WORD)}" in elements.text and html.escape("\\frac$ {{7*7}} \\x1b\\ud800") in page


def test_texts_of_a_figure_are_drawn_as_they_are():
    """What is between two dollars is no formula, and the file is XML."""
    figure, ax = plt.subplots()
    figure.suptitle(f"{HOSTILE_WORD}$a$")
    for i, word in enumerate(HOSTILE):
        ax.text(0, i, f"$x${word}")
    ax.plot([1], [1], label="$\\sqrt$")
    ax.legend()
    svg = image(figure, "svg")
    ET.fromstring(svg)
    assert b"$a$" in svg and svg.count(b"<!-- $x$") == len(HOSTILE) and b"<!-- $\\sqrt$ -->" in svg
    assert image(figure, "png")[:4] == b"\x89PNG"


def test_powers_of_ten_at_ticks_stay_formulas():
    """Raw ones would have the letters and dollars of a formula, which a label adds."""
    figure, ax = plt.subplots()
    ax.plot([1, 2], [1, 1000])
    ax.set_yscale("log")
    glyphs = {*re.findall(rb'id="DejaVuSans-(\w+)"', image(figure, "svg"))}
    ax.set_ylabel("$m$")
    assert len({*re.findall(rb'id="DejaVuSans-(\w+)"', image(figure, "svg"))} - glyphs) == 2


def test_folder_of_any_name_is_the_title_of_its_plot(everything):
    run = next(iter(everything.runs.values()))
    figure = draw_run(run._replace(path=run.path.with_name("$\\frac$\ud800<b>"), result={}))
    ET.fromstring(image(figure, "svg"))
    assert figure.get_suptitle() == "$\\frac$\\ud800<b>"
