"""Makes files of the formats that are read: by their usual libraries, or from bytes."""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from datetime import date, datetime
from email.message import EmailMessage

import docx
import openpyxl
import pptx
import pypdf
import xlwt
from odf.opendocument import OpenDocumentSpreadsheet
from odf.table import Table, TableCell, TableRow
from odf.text import P
from pptx.util import Inches


def pdf(pages: Sequence[Sequence[str]], *, image_pages: Sequence[int] = ()) -> bytes:
    """Return a PDF with lines of ASCII on each page; the pages of those numbers have an image alone."""
    objects: list[bytes] = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"",
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    pixel = (
        b"<< /Type /XObject /Subtype /Image /Width 1 /Height 1 /ColorSpace /DeviceGray /BitsPerComponent 8 /Length 1 >>"
    )
    objects.append(pixel + b"\nstream\n\x80\nendstream")
    kids: list[str] = []
    for number, lines in enumerate(pages, start=1):
        if number in image_pages:
            content = b"q 400 0 0 400 50 50 cm /Im1 Do Q"
        else:
            shown = " ".join(f"({line.translate({40: '[', 41: ']', 92: '/'})}) Tj T*" for line in lines)
            content = f"BT /F1 12 Tf 72 720 Td 14 TL {shown} ET".encode("latin-1")
        packed = zlib.compress(content)
        objects.append(b"<< /Length %d /Filter /FlateDecode >>\nstream\n" % len(packed) + packed + b"\nendstream")
        kids.append(f"{len(objects) + 1} 0 R")
        objects.append(
            b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents %d 0 R "
            b"/Resources << /Font << /F1 3 0 R >> /XObject << /Im1 4 0 R >> >> >>" % len(objects)
        )
    objects[1] = f"<< /Type /Pages /Kids [{' '.join(kids)}] /Count {len(kids)} >>".encode()
    return _pdf_file(objects)


def pdf_of_many_pages(number: int) -> bytes:
    """Return a PDF whose page tree names one page so many times."""
    kids = b"3 0 R " * number
    return _pdf_file(
        [
            b"<< /Type /Catalog /Pages 2 0 R >>",
            b"<< /Type /Pages /Kids [" + kids + b"] /Count %d >>" % number,
            b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 10 10] >>",
        ]
    )


def _pdf_file(objects: Sequence[bytes]) -> bytes:
    out = bytearray(b"%PDF-1.4\n")
    offsets: list[int] = []
    for number, body in enumerate(objects, start=1):
        offsets.append(len(out))
        out += b"%d 0 obj\n" % number + body + b"\nendobj\n"
    table = len(out)
    out += b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1)
    out += b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    out += b"trailer << /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n" % (len(objects) + 1, table)
    return bytes(out)


def encrypted_pdf() -> bytes:
    writer = pypdf.PdfWriter(clone_from=io.BytesIO(pdf([["secret"]])))
    writer.encrypt("password", algorithm="RC4-128")
    out = io.BytesIO()
    writer.write(out)
    return out.getvalue()


def word(
    paragraphs: Sequence[str], table: Sequence[Sequence[str]] = (), *, heading: str = "", header: str = ""
) -> bytes:
    document = docx.Document()
    if header:
        document.sections[0].header.paragraphs[0].text = header
    if heading:
        document.add_heading(heading, 1)
    for text in paragraphs:
        document.add_paragraph(text)
    if table:
        made = document.add_table(len(table), len(table[0]))
        for row, cells in zip(made.rows, table, strict=True):
            for cell, text in zip(row.cells, cells, strict=True):
                cell.text = text
    out = io.BytesIO()
    document.save(out)
    return out.getvalue()


def presentation(slides: Sequence[tuple[str, str]], table: Sequence[Sequence[str]] = ()) -> bytes:
    """Return a presentation: title and body of each slide; a table stands on the last one."""
    made = pptx.Presentation()
    for title, body in slides:
        slide = made.slides.add_slide(made.slide_layouts[1])
        slide.shapes.title.text = title
        slide.placeholders[1].text = body
        slide.notes_slide.notes_text_frame.text = f"Say {title}"
    if table:
        shape = slide.shapes.add_table(len(table), len(table[0]), Inches(1), Inches(3), Inches(5), Inches(1))
        for number, cells in enumerate(table):
            for column, text in enumerate(cells):
                shape.table.cell(number, column).text = text
    out = io.BytesIO()
    made.save(out)
    return out.getvalue()


def workbook(sheets: Mapping[str, Sequence[Sequence[object]]], *, hidden: Sequence[str] = ()) -> bytes:
    made = openpyxl.Workbook()
    made.remove(made.worksheets[0])
    for name, rows in sheets.items():
        sheet = made.create_sheet(name)
        for row in rows:
            sheet.append(list(row))
        if name in hidden:
            sheet.sheet_state = "hidden"
    out = io.BytesIO()
    made.save(out)
    return out.getvalue()


def old_workbook(rows: Sequence[Sequence[object]], name: str = "Prices") -> bytes:
    made = xlwt.Workbook()
    sheet = made.add_sheet(name)
    as_date = xlwt.easyxf(num_format_str="YYYY-MM-DD")
    for number, row in enumerate(rows):
        for column, cell in enumerate(row):
            if isinstance(cell, date | datetime):
                sheet.write(number, column, cell, as_date)
            else:
                sheet.write(number, column, cell)
    out = io.BytesIO()
    made.save(out)
    return out.getvalue()


def open_document(rows: Sequence[Sequence[str | float]], name: str = "Prices") -> bytes:
    made = OpenDocumentSpreadsheet()
    table = Table(name=name)
    for row in rows:
        line = TableRow()
        for cell in row:
            if isinstance(cell, str):
                made_cell = TableCell(valuetype="string")
                made_cell.addElement(P(text=cell))
            else:
                made_cell = TableCell(valuetype="float", value=cell)
            line.addElement(made_cell)
        table.addElement(line)
    made.spreadsheet.addElement(table)
    out = io.BytesIO()
    made.write(out)
    return out.getvalue()


def encrypted_office_file() -> bytes:
    """Return the beginning of an encrypted workbook: a compound file with the streams of [MS-OFFCRYPTO] section 2.3."""
    names = ("Root Entry", "EncryptionInfo", "EncryptedPackage")
    entries = b"".join(name.encode("utf-16-le").ljust(64, b"\0") + bytes(64) for name in names)
    return b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(504) + entries


def message(text: str, *, html: str = "", attachments: Mapping[str, bytes] | None = None) -> bytes:
    made = EmailMessage()
    made["From"], made["To"] = "ann@example.org", "bob@example.org"
    made["Subject"], made["Date"] = "Prices", "Mon, 02 Mar 2026 10:00:00 +0000"
    made.set_content(text)
    if html:
        made.add_alternative(html, subtype="html")
    for name, content in (attachments or {}).items():
        made.add_attachment(content, maintype="application", subtype="octet-stream", filename=name)
    return made.as_bytes()


def archive(members: Mapping[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as made:
        for name, content in members.items():
            made.writestr(name, content)
    return out.getvalue()


def pdf_placed(pieces: Sequence[tuple[float, float, str]]) -> bytes:
    """Return a PDF of one page with each piece of ASCII at its place, in points from the left and the bottom."""
    shown = "".join(
        f"BT /F1 11 Tf 1 0 0 1 {x:g} {y:g} Tm ({text.translate({40: '[', 41: ']', 92: '/'})}) Tj ET\n"
        for x, y, text in pieces
    )
    packed = zlib.compress(shown.encode("latin-1"))
    return _pdf_file(
        [
            b"<< /Type /Catalog /Pages 2 0 R >>",
            b"<< /Type /Pages /Kids [5 0 R] /Count 1 >>",
            b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
            b"<< /Length %d /Filter /FlateDecode >>\nstream\n" % len(packed) + packed + b"\nendstream",
            b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents 4 0 R "
            b"/Resources << /Font << /F1 3 0 R >> >> >>",
        ]
    )


def pdf_table(title: str, rows: Sequence[Sequence[str]], *, by_columns: bool) -> bytes:
    """Return a PDF with a table whose cells are written row by row, or column by column."""
    places = [
        (72 + 160 * column, 700 - 18 * row, text) for row, cells in enumerate(rows) for column, text in enumerate(cells)
    ]
    if by_columns:
        places.sort(key=lambda place: (place[0], -place[1]))
    return pdf_placed([(72, 740, title), *places])


def pdf_columns(left: Sequence[str], right: Sequence[str]) -> bytes:
    """Return a PDF with running text in two columns."""
    return pdf_placed(
        [(x, 700 - 14 * row, text) for x, lines in ((72, left), (330, right)) for row, text in enumerate(lines)]
    )
