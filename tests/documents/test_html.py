"""Of a page only what a browser shows is read."""

from __future__ import annotations

import pytest

from octollm.documents.html import extract_visible
from octollm.documents.model import ReadBudget, ReadLimits
from octollm.documents.reading import read_plain

PAGE = """<!doctype html><html><head><meta charset="windows-1252"><title>Price list</title>
<style>p { color: red }</style><script>var price = 13.37;</script></head>
<body><h1>Prices</h1>%s<p>The <b>red</b> one<br>costs 5 \u20ac.</p><ul><li>a<li>b</ul></body></html>"""
TEXT = "Price list\n\n# Prices\n\nThe red one\ncosts 5 €.\n\n- a\n- b"


@pytest.mark.parametrize(
    "hidden",
    [
        "<script>price = 99</script>",
        "<style>.x::after { content: '99' }</style>",
        "<!-- price 99 -->",
        "<p hidden>price 99</p>",
        "<div hidden><p>price <b>99</b></p><div>99</div></div>",
        '<p style="color: red; display : none">price 99</p>',
        '<p style="visibility:hidden">99</p>',
        "<template><p>99</p></template>",
        "<noscript><p>99</p></noscript>",
        "<svg><text>99</text></svg>",
        "<dialog>99</dialog>",
        '<input type="hidden" value="99">',
        "<iframe>99</iframe>",
    ],
)
def test_hidden_content_is_left_out(hidden: str):
    document = read_plain("a.html", (PAGE % hidden).encode("cp1252"))
    assert document.text == TEXT
    assert document.notes == ("read as Windows-1252",)


def test_tables_are_tables():
    inner = "<table><tr><td>in<td>ner</table>"
    page = f"<table><caption>Prices</caption><tr><th>Name<th>Price<tr><td colspan=2>x {inner}</table>"
    document = read_plain("a.html", page.encode())
    assert [(table.name, table.rows) for table in document.tables] == [
        ("table 1", [["in", "ner"]]),
        ("Prices", [["Name", "Price"], ["x in | ner", None]]),
    ]
    assert document.text == "Name | Price\nx in | ner |"


def test_preformatted_text_keeps_its_spaces():
    assert read_plain("a.html", b"<pre>a\n  b</pre>c   d").text == "a\n  b\n\nc d"


@pytest.mark.parametrize("source", ["<div>" * 100_000 + "x", "<table>" * 20_000 + "x", "<b " + "a=1 " * 20_000 + ">x"])
def test_deep_and_long_elements_take_linear_time(source: str):
    assert "x" in extract_visible(source, ReadBudget(ReadLimits())).text


def test_an_entity_of_a_document_type_reads_nothing():
    page = b'<!DOCTYPE html [<!ENTITY a SYSTEM "file:///etc/passwd">]><p>&a;</p>'
    assert "root:" not in read_plain("a.html", page).text
