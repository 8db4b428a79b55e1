"""Documents of every format: filled templates, tables in PDF, Word and HTML, mails, archives, source code."""

from __future__ import annotations

import random
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import document_files as made

from answer_corpus.model import Case, Question, absent, said
from answer_corpus.templates import FILLERS, TEMPLATES, Template

PERSONS = (
    "Maria Keller",
    "Jonas Weber",
    "Nadia Rossi",
    "Peter Novak",
    "Helga Lind",
    "Omar Haddad",
    "Ines Duarte",
    "Viktor Malik",
)
CITIES = ("Rotterdam", "Salzburg", "Bergen", "Toledo", "Gdansk", "Lyon")
COMPANIES = ("Hydrotec Ltd", "Nordpump", "Aqualine Supplies")
PAGE_LINES = 24


def fill(template: Template, rng: random.Random) -> dict[str, str]:
    person, other = rng.sample(PERSONS, 2)
    return {
        "money": str(rng.randint(310, 989)),
        "days": str(rng.randint(11, 89)),
        "deposit": str(rng.randint(1010, 2980)),
        "flow": str(rng.randint(101, 299)),
        "degrees": str(rng.randint(40, 95)),
        "code": str(rng.randint(10, 99)),
        "votes": str(rng.randint(3010, 9990)),
        "hour": str(rng.randint(10, 22)),
        "cents": str(rng.randint(21, 49)),
        "minutes": str(rng.randint(31, 299)),
        "years": str(rng.randint(3, 12)),
        "phone": f"0800 {rng.randint(100000, 999999)}",
        "person": person,
        "other": other,
        "city": rng.choice(CITIES),
        "company": rng.choice(COMPANIES),
        "server": f"web-{rng.randint(10, 99)}",
        "cause": "certificate",
        "person_zh": rng.choice(("王小明", "李建国", "陈美玲")),
        "person_ja": rng.choice(("佐藤健一", "鈴木花子", "田中一郎")),
    }


def paragraphs(template: Template, rng: random.Random, fillers: int) -> tuple[list[str], dict[str, str], list[str]]:
    """Return the paragraphs of a filled text, its slots, and the sentences with facts."""
    slots = fill(template, rng)
    facts = [line.format(**slots) for line in template.lines]
    pool = [rng.choice(FILLERS[template.language]) for _ in range(fillers)]
    mixed = [*facts, *pool]
    rng.shuffle(mixed)
    return [template.title, *mixed], slots, facts


def as_pdf(texts: Sequence[str]) -> bytes:
    lines = [line for text in texts for line in [*textwrap.wrap(text, 70), ""]]
    return made.pdf([lines[at : at + PAGE_LINES] for at in range(0, len(lines), PAGE_LINES)])


def as_html(texts: Sequence[str]) -> bytes:
    body = "".join(f"<p>{text}</p>" for text in texts[1:])
    return (
        f"<!DOCTYPE html><html><head><meta charset='utf-8'><title>{texts[0]}</title><style>p {{ width: 999px }}</style>"
        f"<script>var rent = 'The monthly rent is 99999 euros';</script></head><body><h1>{texts[0]}</h1>{body}"
        "<p style='display:none'>hidden words 88888</p></body></html>"
    ).encode()


def as_slides(texts: Sequence[str]) -> bytes:
    return made.presentation(
        [(f"{texts[0]} {at // 3 + 1}", "\n".join(texts[1:][at : at + 3])) for at in range(0, len(texts) - 1, 3)]
    )


def as_text(encoding: str) -> Callable[[Sequence[str]], bytes]:
    return lambda texts: "\r\n\r\n".join(texts).encode(encoding)


def as_lines(texts: Sequence[str]) -> bytes:
    return "\n\n".join(textwrap.fill(text, 60) for text in texts).encode()


def as_markdown(texts: Sequence[str]) -> bytes:
    return ("# " + texts[0] + "\n\n" + "\n\n".join(texts[1:]) + "\n").encode()


def as_mail(texts: Sequence[str]) -> bytes:
    return made.message("\n\n".join(texts))


def as_word(texts: Sequence[str]) -> bytes:
    return made.word(list(texts[1:]), heading=texts[0])


FORMATS: dict[str, tuple[str, Callable[[Sequence[str]], bytes], bool]] = {
    "pdf": (".pdf", as_pdf, True),
    "docx": (".docx", as_word, False),
    "pptx": (".pptx", as_slides, False),
    "html": (".html", as_html, True),
    "md": (".md", as_markdown, True),
    "txt": (".txt", as_lines, True),
    "eml": (".eml", as_mail, False),
    "cp1252": (".txt", as_text("cp1252"), True),
    "utf16": (".txt", as_text("utf-16"), True),
    "cp1250": (".txt", as_text("cp1250"), True),
    "cp1251": (".txt", as_text("cp1251"), True),
    "gbk": (".txt", as_text("gb18030"), True),
    "sjis": (".txt", as_text("cp932"), True),
    "utf8": (".txt", as_text("utf-8"), True),
}
"""Suffix, maker, and whether the bytes are the same on every machine."""
CHOSEN = {
    "lease": ("pdf", "docx", "html"),
    "manual": ("pptx", "txt", "md"),
    "minutes": ("eml", "docx"),
    "policy": ("html", "pdf"),
    "incident": ("md", "pptx"),
    "vertrag": ("docx", "cp1252"),
    "anleitung": ("utf16", "html"),
    "contrat": ("cp1252", "docx"),
    "informe": ("utf8", "pptx"),
    "regolamento": ("md",),
    "reglement": ("utf8",),
    "umowa": ("cp1250",),
    "contrato": ("docx",),
    "dogovor": ("cp1251",),
    "hetong": ("gbk", "docx"),
    "keiyaku": ("sjis", "html"),
    "gyeyak": ("utf8",),
    "aqd": ("utf8",),
}
HIDDEN = ("99999", "88888", "width: 999px")


def filled(template: Template, form: str) -> Case:
    rng = random.Random(f"document {template.name} {form}")
    texts, slots, facts = paragraphs(template, rng, rng.randint(8, 20))
    suffix, make, is_plain = FORMATS[form]
    asked = rng.sample(template.asked, 2)
    questions = [said(text, slots[slot]) for text, slot in asked]
    questions.append(absent(rng.choice(template.absent)))
    return Case(
        f"document-{template.name}-{form}",
        "document",
        {f"{template.name}_{form}{suffix}": make(texts)},
        texts=tuple(("", fact) for fact in facts),
        hidden=HIDDEN if form == "html" else (),
        questions=tuple(questions),
        is_plain=is_plain,
    )


def prices(rng: random.Random, n: int) -> list[tuple[str, str, str]]:
    names = (
        "Anchor",
        "Bracket",
        "Clamp",
        "Drill",
        "Elbow",
        "Flange",
        "Gasket",
        "Hinge",
        "Insert",
        "Joint",
        "Key",
        "Lever",
    )
    return [(name, str(rng.randint(2, 95)), f"{rng.randint(101, 9999) / 100:.2f}") for name in names[:n]]


def row_texts(rows: Sequence[Sequence[str]]) -> tuple[tuple[str, str], ...]:
    return tuple(("", " ".join(row)) for row in rows)


def price_question(rows: Sequence[tuple[str, str, str]], rng: random.Random) -> Question:
    name, _, price = rng.choice(rows)
    return said(f"What is the price of {name}?", price)


def tables_in_documents() -> list[Case]:
    cases: list[Case] = []
    head = ("Article", "Count", "Price")
    for number, by_columns in enumerate((False, True)):
        rng = random.Random(f"pdf table {number}")
        rows = prices(rng, 12)
        data = made.pdf_table("Price list 2024", [head, *rows], by_columns=by_columns)
        cases.append(
            Case(
                f"document-pdf-table-{number}",
                "document",
                {f"price_list_{number}.pdf": data},
                texts=row_texts(rows),
                questions=(price_question(rows, rng), absent("What is the price of Wrench?")),
            )
        )
    rng = random.Random("pdf columns")
    left = [
        "The museum opens at 9:40 on",
        "weekdays. Tickets cost 17 euros",
        "for adults. Children under the",
        "age of 11 are free.",
    ]
    right = [
        "The cafe closes at 18:20. Dogs",
        "are not allowed in the rooms.",
        "Lockers need a coin of 2 euros.",
        "The shop sells 143 postcards.",
    ]
    cases.append(
        Case(
            "document-pdf-columns",
            "document",
            {"museum.pdf": made.pdf_columns(left, right)},
            texts=(("page 1", "Tickets cost 17 euros for adults."), ("page 1", "Dogs are not allowed in the rooms.")),
            questions=(said("How much do tickets for adults cost?", "17"), said("When does the cafe close?", "18:20")),
        )
    )
    rng = random.Random("docx table")
    rows = prices(rng, 9)
    cases.append(
        Case(
            "document-docx-table",
            "document",
            {"offer.docx": made.word(["Our prices are net."], [head, *rows], heading="Offer")},
            texts=row_texts(rows),
            questions=(price_question(rows, rng),),
            is_plain=False,
        )
    )
    rng = random.Random("pptx table")
    rows = prices(rng, 6)
    cases.append(
        Case(
            "document-pptx-table",
            "document",
            {"offer.pptx": made.presentation([("Offer", "Net prices")], [head, *rows])},
            texts=tuple(("slide 1", text) for _, text in row_texts(rows)),
            questions=(price_question(rows, rng),),
            is_plain=False,
        )
    )
    rng = random.Random("html table")
    rows = prices(rng, 10)
    cells = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in [head, *rows])
    page = f"<html><body><script>price = 12345.67</script><table>{cells}</table></body></html>".encode()
    cases.append(
        Case(
            "document-html-table",
            "document",
            {"offer.html": page},
            texts=row_texts(rows),
            hidden=("12345.67",),
            questions=(price_question(rows, rng),),
        )
    )
    cases.append(
        Case(
            "document-xls-is-html",
            "document",
            {"offer.xls": page},
            texts=row_texts(rows),
            hidden=("12345.67",),
            questions=(price_question(rows, rng),),
        )
    )
    rng = random.Random("md table")
    rows = prices(rng, 10)
    text = "# Offer\n\n| Article | Count | Price |\n|---|---|---|\n" + "".join(
        f"| {' | '.join(row)} |\n" for row in rows
    )
    cases.append(
        Case(
            "document-md-table",
            "document",
            {"offer.md": text.encode()},
            texts=row_texts(rows),
            questions=(price_question(rows, rng),),
        )
    )
    return cases


def long_pdf(pages: int = 200) -> tuple[bytes, dict[int, str]]:
    """Return a report of so many pages, and a fact for some of them."""
    rng = random.Random(f"long {pages}")
    facts = {
        number: f"Section {number} costs {rng.randint(10_000, 99_999)} euros." for number in range(10, pages + 1, 19)
    }
    content: list[list[str]] = []
    for number in range(1, pages + 1):
        lines = [f"Page {number} of the annual report"]
        lines += [line for _ in range(12) for line in textwrap.wrap(rng.choice(FILLERS["en"]), 80)]
        if number in facts:
            lines.insert(rng.randint(1, len(lines)), facts[number])
        content.append(lines)
    return made.pdf(content), facts


def reports() -> list[Case]:
    data, facts = long_pdf(60)
    chosen = list(facts)[1]
    amount = facts[chosen].split()[3]
    scanned = made.pdf([["The contract number is 48151."], [], ["The contract ends in May 2027."]], image_pages=[2])
    return [
        Case(
            "document-long-pdf",
            "document",
            {"annual_report.pdf": data},
            texts=tuple((f"page {n}", text) for n, text in facts.items()),
            questions=(
                said(f"How much does section {chosen} cost?", amount, place=f"page {chosen}"),
                absent("Who is the auditor of the report?"),
            ),
        ),
        Case(
            "document-scanned-page",
            "document",
            {"scan.pdf": scanned},
            texts=(("page 1", "The contract number is 48151."), ("page 3", "The contract ends in May 2027.")),
            note="page 2 is not readable",
            questions=(
                said("What is the contract number?", "48151", place="page 1"),
                said("When does the contract end?", "2027", place="page 3"),
            ),
        ),
    ]


def containers() -> list[Case]:
    rng = random.Random("containers")
    offer = made.pdf([["The delivery takes 23 days.", "The price is 7420 EUR net."]])
    notes = b"The customer prefers delivery on Tuesdays.\n"
    mail = made.message(
        "Please find the offer attached.\nKind regards,\nLena Vogt",
        attachments={"offer.pdf": offer, "notes.txt": notes},
    )
    inner = made.archive({"deep.txt": b"The locker code is 7391."})
    pack = made.archive(
        {
            "docs/offer.pdf": offer,
            "notes.md": b"# Notes\n\nThe warranty lasts 48 months.\n",
            "inner.zip": inner,
            "logo.png": b"\x89PNG\r\n\x1a\n....",
        }
    )
    page = made.message("plain", html="<p>The meeting moves to <b>Thursday</b> at 15:45.</p><script>Friday</script>")
    thread = made.message(
        f"Hi Tom,\n\nthe invoice {rng.randint(10000, 99999)} over 912 euros is due on 14 March.\n\n> When is it due?\n"
    )
    return [
        Case(
            "document-mail-attachment",
            "document",
            {"offer.eml": mail},
            texts=(
                ("part offer.pdf, page 1", "The delivery takes 23 days."),
                ("part body", "Please find the offer attached."),
            ),
            questions=(
                said("How many days does the delivery take?", "23", place="part offer.pdf, page 1"),
                said("On which day does the customer prefer delivery?", "Tuesday"),
                absent("What is the discount?"),
            ),
            is_plain=False,
        ),
        Case(
            "document-zip",
            "document",
            {"papers.zip": pack},
            texts=(
                ("docs/offer.pdf, page 1", "The price is 7420 EUR net."),
                ("notes.md", "The warranty lasts 48 months."),
                ("inner.zip/deep.txt", "The locker code is 7391."),
            ),
            note="logo.png was not read",
            questions=(
                said("What is the price?", "7420", place="docs/offer.pdf, page 1"),
                said("How long does the warranty last?", "48"),
                said("What is the locker code?", "7391"),
            ),
            is_plain=False,
        ),
        Case(
            "document-mail-html",
            "document",
            {"meeting.eml": page},
            texts=(("part body", "plain"),),
            questions=(),
            is_plain=False,
        ),
        Case(
            "document-mail-thread",
            "document",
            {"invoice.eml": thread},
            texts=(("part body", "over 912 euros is due on 14 March."),),
            questions=(said("When is the invoice due?", "14 March|March 14"),),
            is_plain=False,
        ),
    ]


CODE = {
    "limits.py": (
        '"""Limits of the upload service."""\n\nMAX_UPLOAD_BYTES = 7340032  # seven mebibytes\nRETRY_SECONDS = 45\n\n\n'
        "def is_allowed(size: int) -> bool:\n    return size <= MAX_UPLOAD_BYTES\n",
        (
            said("What is the value of RETRY_SECONDS?", "45"),
            said("What is the value of MAX_UPLOAD_BYTES?", "7340032"),
            absent("Which database does the service use?"),
        ),
    ),
    "server.js": (
        "// The server of the shop\nconst PORT = 8421;\nconst TIMEOUT_MS = 2750;\n\n"
        "function start() {\n  listen(PORT);\n}\n",
        (said("On which port does the server listen?", "8421"), said("What is TIMEOUT_MS?", "2750")),
    ),
    "deploy.yaml": (
        "service: shop\nreplicas: 6\nimage: registry.example/shop:4.17\nmemory: 768Mi\n",
        (said("How many replicas are there?", "6"), said("How much memory does the service have?", "768")),
    ),
    "schema.sql": (
        "-- Orders of the shop\nCREATE TABLE orders (\n  id BIGINT PRIMARY KEY,\n"
        "  total NUMERIC(12, 2) NOT NULL,\n  state VARCHAR(24)\n);\n",
        (said("What is the primary key of orders?", "id"),),
    ),
}


def code() -> list[Case]:
    return [
        Case(
            f"document-code-{name}",
            "document",
            {name: text.encode()},
            texts=(("", text.split("\n")[1] or text.split("\n")[2]),),
            questions=asked,
        )
        for name, (text, asked) in CODE.items()
    ]


def together() -> list[Case]:
    """Return two documents of which one has the answer, and one that only seems to."""
    rng = random.Random("together")
    texts, slots, _ = paragraphs(TEMPLATES[0], rng, 8)
    other, more, _ = paragraphs(TEMPLATES[3], rng, 8)
    files: dict[str, Any] = {"lease.txt": as_lines(texts), "policy.txt": as_lines(other)}
    return [
        Case(
            "document-two-files",
            "document",
            files,
            questions=(
                said("How much is the monthly rent?", slots["money"]),
                said("How many cents are paid per kilometre for a private car?", more["cents"]),
                absent("What is the wifi password?"),
            ),
        )
    ]


def build() -> list[Case]:
    by_name = {template.name: template for template in TEMPLATES}
    cases = [filled(by_name[name], form) for name, forms in CHOSEN.items() for form in forms]
    return [*cases, *tables_in_documents(), *reports(), *containers(), *code(), *together()]
