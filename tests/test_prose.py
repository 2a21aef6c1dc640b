"""The documents can be read: short sentences, and links whose targets exist."""

import re

import pytest

from tests.helpers import CHECKOUT

README = CHECKOUT / "README.md"
#: What a newcomer reads. experiments/results/ has records of their day.
DOCUMENTS = sorted([*CHECKOUT.glob("*.md"), *(CHECKOUT / "docs").rglob("*.md")])
MAX_WORDS = 40


def sentences(text: str) -> list[str]:
    """Return the sentences of a Markdown text: those of paragraphs, list items and cells of tables, not code."""
    text = re.sub(r"^```.*?^```$|^:::.*?$", "\n\n", text, flags=re.M | re.S)
    text = re.sub(r"^\|?[-|: ]+\|$", "\n\n", text, flags=re.M)
    text = re.sub(r"`[^`]*`", "Code", text)
    text = re.sub(r"!?\[([^]]*)\]\([^)]*\)", r"\1", text)
    blocks = re.split(r"\n\s*\n|^\s*(?:[-*]|\d+\.) |^#+ |\|", text, flags=re.M)
    found = (s for block in blocks for s in re.split(r"(?<=[.!?])[)*\"]*\s+(?=[A-Z`*\"(\d])", " ".join(block.split())))
    return [sentence for sentence in found if re.search(r"[a-z]", sentence)]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: str(d.relative_to(CHECKOUT)))
def test_no_sentence_has_more_than_forty_words(document):
    long = [s for s in sentences(document.read_text()) if len(re.findall(r"\w[\w'.-]*", s)) > MAX_WORDS]
    assert not long, long


def test_sentences_are_found_in_paragraphs_lists_tables_and_notes():
    text = "# Title\n\nOne `a. B`. Two\nends.\n\n- Three: x.\n\n| a | Four. Five |\n|---|---|\n\n```sh\nmake x\n```\n"
    text += ":::{note}\nSix.\n:::\n"
    assert sentences(text) == ["Title", "One Code.", "Two ends.", "Three: x.", "a", "Four.", "Five", "Six."]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: str(d.relative_to(CHECKOUT)))
def test_links_to_files_lead_somewhere(document):
    text = re.sub(r"^```.*?^```$", "", document.read_text(), flags=re.M | re.S)
    targets = [t.partition("#")[0] for t in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in t]
    missing = [t for t in targets if t and not t.startswith("mailto:") and not (document.parent / t).exists()]
    assert not missing, missing
