"""E-mail messages: headers, body and attachments (RFC 5322, MIME of RFC 2045)."""

from __future__ import annotations

from email import policy
from email.message import EmailMessage, Message
from email.parser import BytesParser
from typing import cast

from octollm.documents.archive import ReadInner, place_inside, printable_name, shorten_notes
from octollm.documents.decoding import clean_text, decode_text
from octollm.documents.html import extract_visible
from octollm.documents.model import Document, DocumentError, Location, RawTable, ReadBudget, Section

_SHOWN_HEADERS = ("From", "To", "Cc", "Date", "Subject")
_MAX_HEADER = 2000


def read_email(name: str, data: bytes, budget: ReadBudget, read_inner: ReadInner) -> Document:
    """Return headers, body and attachments of a message.

    Of alternatives the plain text is read, else the visible text of the HTML. An attachment that cannot be read becomes
    a note. Raises :class:`DocumentError`.
    """
    try:
        message = BytesParser(policy=policy.default).parsebytes(data)
        return _read_message(name, message, budget, read_inner)
    except (DocumentError, RecursionError):
        raise
    except Exception as exc:  # the standard library's parser fails in many ways over headers that are no headers
        raise DocumentError(f"The e-mail is damaged: {type(exc).__name__}") from exc


def _read_message(name: str, message: EmailMessage, budget: ReadBudget, read_inner: ReadInner) -> Document:
    sections: list[Section] = []
    tables: list[RawTable] = []
    notes: list[str] = []
    headers = [f"{header}: {_header(message, header)}" for header in _SHOWN_HEADERS if message[header] is not None]
    if headers:
        sections.append(Section("\n".join(headers), Location(part="headers")))
    body = message.get_body(("plain", "html"))
    for number, part in enumerate(message.walk(), start=1):
        budget.add_members(1)
        if part.is_multipart() and part.get_content_type() != "message/rfc822":
            continue
        content = _content(part)
        if part is body:
            text = _body_text(part, content, budget, notes, tables)
            budget.add_characters(len(text))
            if text.strip():
                sections.append(Section(text, Location(part="body")))
        elif part.get_filename() or part.get_content_disposition() == "attachment":
            shown = printable_name(part.get_filename() or f"part {number}")
            try:
                inner = read_inner(shown, content, budget)
            except DocumentError as error:
                if error.code == "file_limit_exceeded":
                    raise
                notes.append(f"{shown} was not read: {error.detail}")
                continue
            place_inside(inner, sections, tables, notes, part=shown)
    return Document(name, "email", tuple(sections), tuple(tables), shorten_notes(notes))


def _header(message: EmailMessage, name: str) -> str:
    return " ".join(clean_text(str(message[name])).split())[:_MAX_HEADER]


def _content(part: Message) -> bytes:
    if part.get_content_type() == "message/rfc822":
        inner = part.get_payload()
        return cast("list[Message]", inner)[0].as_bytes() if isinstance(inner, list) and inner else b""
    content = part.get_payload(decode=True)
    return content if isinstance(content, bytes) else b""


def _body_text(part: Message, content: bytes, budget: ReadBudget, notes: list[str], tables: list[RawTable]) -> str:
    decoded = decode_text(content, part.get_content_charset("") or "")
    # A charset that the message declares is no assumption.
    notes += [
        f"body: {note}" for note in decoded.notes if not (part.get_content_charset() and note.startswith("read as"))
    ]
    if part.get_content_type() != "text/html":
        return decoded.text
    page = extract_visible(decoded.text, budget)
    tables += [RawTable(table.name, table.rows, Location(part="body")) for table in page.tables]
    return page.text
