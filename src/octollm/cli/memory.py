"""`octollm memory`: facts, documents, search and erasure."""

from __future__ import annotations

import contextlib
import functools
from typing import Annotated

import msgspec
import typer
from rich.table import Table
from rich.text import Text

from octollm.cli.output import messages, output, table_cell
from octollm.cli.runtime import (
    EXIT_DONE,
    AsJson,
    ask_for_consent,
    async_command,
    command_settings,
    open_client,
    print_json,
    run_command,
)
from octollm.contracts.memory_operations import Erasure, Fact, FactHistory, FactList

app = typer.Typer()
memory_app = typer.Typer(name="memory", help="Facts and documents: set, search and erase them.", no_args_is_help=True)
app.add_typer(memory_app, rich_help_panel="Tasks")

FactName = Annotated[str, typer.Argument(help="The fact's name: a-z, 0-9, `.`, `_`, `-`.", metavar="NAME")]
Subject = Annotated[str, typer.Option(help="What the fact is about, as free text; by default the tenant itself.")]
At = Annotated[str | None, typer.Option(help="Valid at this time (RFC 3339) instead of now.", metavar="TIME")]


@memory_app.command("set")
@async_command
async def set_fact(
    name: FactName,
    value: Annotated[str, typer.Argument(help="JSON; a value that is not valid JSON is taken as text.")],
    subject: Subject = "",
    confidence: Annotated[float, typer.Option(help="From 0 to 1.", min=0, max=1)] = 1.0,
    source: Annotated[str, typer.Option(help="A note on the source of the fact.")] = "",
    valid_from: Annotated[str | None, typer.Option("--from", help="Valid from (RFC 3339).", metavar="TIME")] = None,
    valid_until: Annotated[str | None, typer.Option("--until", help="Valid until (RFC 3339).", metavar="TIME")] = None,
    as_json: AsJson = False,
) -> int:
    """Set a fact. A new value supersedes the old one, which stays in the history."""
    try:
        decoded: object = msgspec.json.decode(value.encode())
    except (msgspec.DecodeError, UnicodeEncodeError):
        decoded = value
    async with open_client(command_settings()) as client:
        fact = await client.memory.put_fact(
            name,
            decoded,
            subject=subject,
            confidence=confidence,
            source=source,
            valid_from=valid_from,
            valid_until=valid_until,
        )
    _print_facts([fact], as_json=as_json, single=True)
    return EXIT_DONE


@memory_app.command("get")
@async_command
async def get_fact(name: FactName, subject: Subject = "", at: At = None, as_json: AsJson = False) -> int:
    """Show a fact as it is valid now."""
    async with open_client(command_settings()) as client:
        fact = await client.memory.fact(name, subject=subject, at=at)
    _print_facts([fact], as_json=as_json, single=True)
    return EXIT_DONE


@memory_app.command("list")
@async_command
async def list_facts(
    words: Annotated[str, typer.Argument(help="Words that subject, name or value contain.")] = "",
    subject: Annotated[str | None, typer.Option(help="Only facts about this.")] = None,
    task: Annotated[str, typer.Option(help="Only facts with this task as a source.")] = "",
    at: At = None,
    limit: Annotated[int, typer.Option(help="How many, newest first.", min=1, max=10_000)] = 50,
    as_json: AsJson = False,
) -> int:
    """List and search facts, newest first."""
    facts: list[Fact] = []
    async with (
        open_client(command_settings()) as client,
        contextlib.aclosing(client.memory.facts(words, subject=subject, task=task, at=at)) as found,
    ):
        async for fact in found:
            facts.append(fact)
            if len(facts) >= limit:
                break
    _print_facts(facts, as_json=as_json)
    return EXIT_DONE


@memory_app.command("history")
@async_command
async def show_history(name: FactName, subject: Subject = "", as_json: AsJson = False) -> int:
    """Show the versions of a fact and their sources, newest first."""
    async with open_client(command_settings()) as client:
        versions = await client.memory.fact_history(name, subject=subject)
    if as_json:
        print_json(FactHistory(versions))
        return EXIT_DONE
    console = output()
    for version in versions:
        console.print(_describe(version.fact))
        for source in version.sources:
            parts = (source.at, source.principal, source.task, source.document[:12], source.note)
            console.print(Text("    · " + "  ".join(part for part in parts if part), "octo.quiet"))
    return EXIT_DONE


@memory_app.command("search")
@async_command
async def search_documents(
    query: Annotated[str, typer.Argument(help="The text to search for.")],
    limit: Annotated[int, typer.Option(help="Number of passages.", min=1, max=50)] = 5,
    as_json: AsJson = False,
) -> int:
    """Search the documents."""
    async with open_client(command_settings()) as client:
        passages = await client.memory.search(query, limit=limit)
    if as_json:
        print_json({"passages": passages})
        return EXIT_DONE
    if not passages:
        # On standard error, as every message is: a script that reads the passages gets none.
        messages().print(Text("No document matches."))
        return EXIT_DONE
    console = output()
    for passage in passages:
        lines = f"line {passage.line_start}"
        if passage.line_end != passage.line_start:
            lines = f"lines {passage.line_start}-{passage.line_end}"
        place = passage.location or lines
        console.print(Text(f"{passage.source}, {place}", "octo.title"))
        console.print(Text(passage.text.rstrip()))
    return EXIT_DONE


@memory_app.command("erase")
def erase(
    fact: Annotated[str | None, typer.Option(help="A fact with its history.", metavar="NAME")] = None,
    subject: Subject = "",
    document: Annotated[str | None, typer.Option(help="A document by its digest.", metavar="DIGEST")] = None,
    task: Annotated[
        str | None, typer.Option(help="Facts and documents that come from this task alone.", metavar="TASK_ID")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="All documents and facts of the tenant.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask for confirmation.")] = False,
    as_json: AsJson = False,
) -> None:
    """Erase a fact, a document, the data of a task, or everything, and print the counts. This cannot be undone."""
    targets = [each is not None for each in (fact, document, task)]
    if sum(targets) + everything != 1:
        raise typer.BadParameter("Give one of --fact, --document, --task and --all.")
    if not yes:
        # Before the event loop runs: a question would block it, and Ctrl-C would wait for the answer.
        ask_for_consent("This cannot be undone. Erase it?")
    raise typer.Exit(run_command(functools.partial(_erase, fact, subject, document, task, as_json=as_json)))


async def _erase(fact: str | None, subject: str, document: str | None, task: str | None, *, as_json: bool) -> int:
    async with open_client(command_settings()) as client:
        if fact is not None:
            done = await client.memory.erase_fact(fact, subject=subject)
        elif document is not None:
            done = await client.memory.erase_document(document)
        elif task is not None:
            done = await client.memory.erase_task(task)
        else:
            done = await client.memory.erase_all()
    _print_erasure(done, as_json=as_json)
    return EXIT_DONE


def _print_facts(facts: list[Fact], *, as_json: bool, single: bool = False) -> None:
    if as_json:
        print_json(facts[0] if single else FactList(tuple(facts)))
        return
    table = Table(box=None)
    for name in ("Subject", "Name", "Value", "Confidence", "Evidence", "From", "Until"):
        table.add_column(name, overflow="fold")
    for fact in facts:
        table.add_row(
            Text(fact.subject),
            Text(fact.name),
            Text(_format_value(fact.value)) if single else table_cell(_format_value(fact.value)),
            f"{fact.confidence:g}",
            str(fact.evidence),
            fact.valid_from[:10],
            (fact.valid_until or "")[:10],
        )
    output().print(table)


def _describe(fact: Fact) -> Text:
    until = f" until {fact.valid_until}" if fact.valid_until else ""
    return Text(f"{fact.version}  {_format_value(fact.value)}  from {fact.valid_from}{until}")


def _format_value(value: object) -> str:
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


def _print_erasure(done: Erasure, *, as_json: bool) -> None:
    if as_json:
        print_json(done)
        return
    facts = _count(done.facts, "fact") + f" ({_count(done.versions, 'version')})"
    kinds = ((done.sources, "source"), (done.documents, "document"), (done.passages, "passage"))
    counts = ", ".join([facts, *(_count(number, kind) for number, kind in kinds)])
    late = "" if done.caches == "cleared" else " Cached copies end within a minute."
    output().print(Text(f"Erased: {counts}.{late}"))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
