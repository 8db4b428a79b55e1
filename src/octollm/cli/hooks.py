"""`octollm hooks`: webhooks of other systems that start tasks."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, cast

import msgspec
import typer
from rich.table import Table
from rich.text import Text

from octollm.cli.output import messages, output, table_cell
from octollm.cli.runtime import EXIT_DONE, AsJson, async_command, command_settings, open_client, print_json
from octollm.contracts.hooks import HmacSignature, HookList, HookTemplate, NewHook, SignatureScheme
from octollm.errors import OctoError, map_file_errors
from octollm.rpc.codec import decode

app = typer.Typer()
hooks_app = typer.Typer(
    name="hooks", help="Manage hooks, which start tasks from other systems' webhooks.", no_args_is_help=True
)
app.add_typer(hooks_app, rich_help_panel="Installation")

HookId = Annotated[str, typer.Argument(help="The hook's id, from `octollm hooks list`.")]
SecretFile = Annotated[
    Path | None, typer.Option(help="File with the sender's secret; - reads standard input.", metavar="PATH")
]


@hooks_app.command("create")
@async_command
async def create_hook(
    name: Annotated[str, typer.Argument(help="Lower-case letters, digits and hyphens.")],
    goal: Annotated[str, typer.Option(help="The goal, with {NAME} as a placeholder for a value of the payload.")],
    scheme: Annotated[str, typer.Option(help="Signature scheme: standard (Standard Webhooks), github, stripe, hmac.")],
    value: Annotated[
        list[str] | None, typer.Option(help="A value of the payload, by JSON Pointer.", metavar="NAME=POINTER")
    ] = None,
    when: Annotated[
        list[str] | None, typer.Option(help="Only payloads with that value; may be repeated.", metavar="POINTER=VALUE")
    ] = None,
    attach_payload: Annotated[
        bool, typer.Option("--attach-payload", help="Give the task the payload as payload.json.")
    ] = False,
    signature: Annotated[
        str, typer.Option(help="Where the scheme hmac finds its signature, as JSON.", metavar="JSON")
    ] = "{}",
    scope: Annotated[str, typer.Option(help="Scopes of its tasks; empty is all of yours.")] = "",
    secret_file: SecretFile = None,
    as_json: AsJson = False,
) -> int:
    """Create a hook and print its secret, which is shown only once."""
    conditions: dict[str, list[str | int | bool | None]] = {}
    for pointer, text in map(_split_pair, when or []):
        conditions.setdefault(pointer, []).append(_parse_value(text))
    # Strictly: a misspelt `timestamp_header` would create a hook that accepts old deliveries.
    options = decode(signature.encode(errors="replace"), HmacSignature, strict=True)
    template = HookTemplate(
        goal,
        dict(map(_split_pair, value or [])),
        {pointer: tuple(values) for pointer, values in conditions.items()},
        attach_payload=attach_payload,
    )
    async with open_client(command_settings()) as client:
        new = await client.admin.create_hook(
            name,
            scheme=cast("SignatureScheme", scheme),
            template=template,
            signature=options,
            scope=scope,
            secret=_read_secret(secret_file),
        )
        return _print_new(new, client.url, as_json=as_json)


@hooks_app.command("list")
@async_command
async def list_hooks(as_json: AsJson = False) -> int:
    """List hooks, without their secrets."""
    async with open_client(command_settings()) as client:
        found = await client.admin.hooks()
    if as_json:
        print_json(HookList(found))
        return EXIT_DONE
    table = Table(box=None)
    for column in ("Id", "Scheme", "Goal", "Last received"):
        table.add_column(column, no_wrap=column in ("Id", "Scheme"), overflow="fold")
    for hook in found:
        table.add_row(hook.id, hook.scheme, table_cell(hook.template.goal), (hook.last_received_at or "never")[:19])
    output().print(table)
    return EXIT_DONE


@hooks_app.command("show")
@async_command
async def show_hook(hook_id: HookId) -> int:
    """Print a hook as JSON."""
    async with open_client(command_settings()) as client:
        print_json(await client.admin.hook(hook_id))
    return EXIT_DONE


@hooks_app.command("rotate")
@async_command
async def rotate_hook(
    hook_id: HookId,
    overlap: Annotated[
        int, typer.Option(help="Seconds for which the previous secret stays valid.", min=0, max=604_800)
    ] = 86_400,
    secret_file: SecretFile = None,
    as_json: AsJson = False,
) -> int:
    """Create a new secret for a hook and print it; it is shown only once."""
    async with open_client(command_settings()) as client:
        secret = _read_secret(secret_file)
        new = await client.admin.rotate_hook(hook_id, overlap_seconds=overlap, secret=secret)
        return _print_new(new, client.url, as_json=as_json)


@hooks_app.command("delete")
@async_command
async def delete_hook(hook_id: HookId, as_json: AsJson = False) -> int:
    """Delete a hook. Tasks that it started continue."""
    async with open_client(command_settings()) as client:
        await client.admin.delete_hook(hook_id)
    if as_json:
        print_json({"id": hook_id, "state": "deleted"})
    else:
        output().print(Text(f"Hook {hook_id} is deleted."))
    return EXIT_DONE


def _print_new(new: NewHook, url: str, *, as_json: bool) -> int:
    if as_json:
        print_json(new)
        return EXIT_DONE
    # Standard output has the secret alone, so that a script can capture it.
    messages().print(Text(f"Senders post to {url}{new.hook.path}. The secret is shown this once:"))
    print(new.secret, flush=True)
    return EXIT_DONE


def _split_pair(text: str) -> tuple[str, str]:
    name, equals, rest = text.partition("=")
    if not equals:
        raise OctoError(f"{text} is not of the form NAME=VALUE.", code="invalid_parameter")
    return name, rest


def _parse_value(text: str) -> str | int | bool | None:
    try:
        return msgspec.json.decode(text, type=int | bool | None)
    except msgspec.MsgspecError:
        return text


def _read_secret(path: Path | None) -> str | None:
    # Never an argument: other users of the machine can read the arguments of a process.
    if path is None:
        return None
    if str(path) == "-":
        return sys.stdin.readline().strip()
    with map_file_errors(path, "read", code="invalid_parameter"):
        return path.read_text(encoding="utf-8").strip()
