"""Text is decoded whatever its encoding, and what was assumed is said."""

from __future__ import annotations

import codecs

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octollm.documents.decoding import clean_text, decode_text, is_text
from octollm.documents.model import DocumentError

LEGACY = {
    "cp1252": (
        "Windows-1252",
        [
            "Der Preis beträgt 1.200 € für Müller & Söhne",
            "café",
            "grüße",
            "naïve façade – “quoted”",
            "name;city\nMüller;Köln\n",
            "£ 12.50",
            "5 m²",
        ],
    ),
    "cp1250": (
        "Windows-1250",
        ["Zażółć gęślą jaźń. Wszystkie ceny są podane w złotych.", "Příliš žluťoučký kůň úpěl ďábelské ódy"],
    ),
    "cp1251": ("Windows-1251", ["Съешь же ещё этих мягких французских булок, да выпей чаю", "Привет мир"]),
    "koi8_r": ("KOI8-R", ["Съешь же ещё этих мягких французских булок, да выпей чаю"]),
    "cp1253": ("Windows-1253", ["Ξεσκεπάζω την ψυχοφθόρα βδελυγμία. Καλημέρα κόσμε"]),
    "cp1255": ("Windows-1255", ["שלום עולם, זה טקסט בעברית על מחירים"]),
    "cp1256": ("Windows-1256", ["مرحبا بالعالم، هذا نص باللغة العربية عن الأسعار"]),
    "gb18030": ("GB 18030", ["中文文本：价格是一百二十元。合同于二〇二四年签订。", "名称,价格\n苹果,12\n香蕉,7\n"]),
    "cp932": ("Shift JIS", ["日本語のテキスト。価格は千二百円です。", "名前,価格\nりんご,120\n"]),
    "euc_jp": ("EUC-JP", ["日本語のテキスト。価格は千二百円です。契約は昨日締結されました。"]),
    "big5": ("Big5", ["繁體中文文字：價格是一百二十元。合約於昨日簽訂。"]),
    "cp949": ("EUC-KR", ["한국어 텍스트입니다. 가격은 천이백원입니다."]),
    "iso2022_jp": ("ISO-2022-JP", ["日本語のテキスト。"]),
}


@pytest.mark.parametrize(
    ("encoding", "label", "text"), [(name, label, text) for name, (label, texts) in LEGACY.items() for text in texts]
)
def test_legacy_encodings(encoding: str, label: str, text: str):
    decoded = decode_text(text.encode(encoding))
    assert decoded.text == text
    assert decoded.notes == (f"read as {label}",)


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("text", ["hello world", "Grüße", "Привет мир\n", "中文文本\n下一行 x"])
def test_wide_encodings_without_a_mark(encoding: str, text: str):
    decoded = decode_text(text.encode(encoding))
    assert decoded.text == text
    assert decoded.notes == (f"read as {encoding[:6].upper()} without a byte order mark",)


@given(st.text(st.characters(exclude_categories=["Cs", "Cc", "Cf"]), max_size=200))
@pytest.mark.parametrize(
    ("mark", "encoding"),
    [(b"", "utf-8"), (codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"),
     (codecs.BOM_UTF32_LE, "utf-32-le"), (codecs.BOM_UTF32_BE, "utf-32-be")],
)  # fmt: skip
def test_unicode_round_trips(mark: bytes, encoding: str, text: str):
    # A file cannot tell its first character from a mark of its own.
    text = text.lstrip("\ufeff")
    assert decode_text(mark + text.encode(encoding)).text == text


@pytest.mark.parametrize("text", ["a\rb\rc", "a\r\nb\r\nc", "a\nb\rc"])
def test_lines_end_with_lf(text: str):
    assert decode_text(text.encode()).text == "a\nb\nc"


def test_stray_nul_characters_are_removed_and_noted():
    decoded = decode_text(b"a\0b and more text")
    assert decoded.text == "ab and more text"
    assert decoded.notes == ("removed 1 NUL characters",)


def test_damaged_characters_are_counted():
    assert (
        decode_text(codecs.BOM_UTF16_LE + b"a\0\x00\xd8b\0").notes[1]
        == "replaced 1 characters that are not valid UTF-16"
    )


def test_characters_that_change_the_direction_are_noted():
    assert "direction" in decode_text("access = 'user\u202e'".encode()).notes[0]


def test_a_declared_encoding_decides_before_a_guess():
    assert decode_text("Привет".encode("koi8_r"), "KOI8-R").text == "Привет"
    assert decode_text("Müller".encode("latin_1"), "iso-8859-1").text == "Müller"
    assert decode_text(b"M\xfcller", "rot13").text == "Müller"
    assert decode_text("Müller".encode(), "iso-8859-1").text == "Müller"


@pytest.mark.parametrize(
    "data", [bytes(range(256)), b"\0" * 100, b"\x01\x02\x03\x04\x05\x06", b"\x7fELF\x02\x01\x01" + bytes(50)]
)
def test_binary_is_no_text(data: bytes):
    assert not is_text(data)
    with pytest.raises(DocumentError):
        decode_text(data)


def test_lone_surrogates_are_replaced():
    assert clean_text("a\ud800b\r\0") == "a\ufffdb\n"


def test_a_short_chinese_table_is_no_greek_one():
    rows = ["日期,商品,数量,金额", *(f"2024-03-{day:02},铲子,{day},￥12.50" for day in range(1, 20)), "合计,,,"]
    assert decode_text("\r\n".join(rows).encode("gb18030")).text == "\n".join(rows)
    greek = "ΗΜΕΡΟΜΗΝΙΑ;ΠΡΟΪΟΝ;ΠΟΣΟ\nΔευτέρα;Λάμπα;12\nΣΥΝΟΛΟ;;12\n"
    assert decode_text(greek.encode("cp1253")).text == greek


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("Data;Ilość;Kwota\n01.02.2024;3;12,50 zł\n", "cp1250"),
        ("Łopata;Żarówka\n", "cp1250"),
        ("Fläche: 12 m³, Preis £12, Œuvre de Paul\n", "cp1252"),
    ],
)
def test_a_few_polish_letters_are_known_and_western_signs_stay(text: str, encoding: str):
    assert decode_text(text.encode(encoding)).text == text
