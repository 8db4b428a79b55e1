"""`octollm keys`: API keys, signing keys of services, and enrolment tokens for arms."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from octollm.cli.output import messages, output
from octollm.cli.runtime import EXIT_DONE, AsJson, async_command, command_settings, open_client, print_json
from octollm.clock import SystemClock, Uuid7Generator, format_rfc3339
from octollm.contracts.auth import KeyList
from octollm.contracts.enrolment import EnrolmentTokenList
from octollm.installation.home import open_keys
from octollm.installation.keys import ROOT
from octollm.installation.provisioning import KeyRotationResult, provision_keys, rotate_signing_key

app = typer.Typer()
keys_app = typer.Typer(name="keys", help="Manage API keys, signing keys and enrolment tokens.", no_args_is_help=True)
app.add_typer(keys_app, rich_help_panel="Access")


@keys_app.command("create")
@async_command
async def create_key(
    name: Annotated[str, typer.Argument(help="What the key is for.")] = "key",
    scope: Annotated[str, typer.Option(help="Presets (user, admin) and scopes, separated by spaces.")] = "user",
    tenant: Annotated[
        str | None, typer.Option(help="Another tenant, for its first key; for the operator of the installation.")
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Create an API key and print its secret, which is shown only once."""
    async with open_client(command_settings()) as client:
        new = await client.admin.create_key(name, scope=scope, tenant=tenant)
    if as_json:
        print_json(new)
        return EXIT_DONE
    # Standard output has the secret alone, so that a script can capture it.
    messages().print(Text(f"Key {new.key.id} ({new.key.name}: {new.key.scope}). It is shown this once:"))
    print(new.secret, flush=True)
    return EXIT_DONE


@keys_app.command("list")
@async_command
async def list_keys(as_json: AsJson = False) -> int:
    """List API keys, without their secrets."""
    async with open_client(command_settings()) as client:
        keys = await client.admin.keys()
    if as_json:
        print_json(KeyList(keys))
        return EXIT_DONE
    table = Table(box=None)
    for column in ("Id", "Name", "Scope", "Made", "Last used", "State"):
        table.add_column(column, no_wrap=column in ("Id", "State"), overflow="fold")
    for key in keys:
        state = "revoked" if key.revoked_at else "good"
        last_used = (key.last_used_at or "")[:10]
        table.add_row(key.id, Text(key.name), Text(key.scope), key.created_at[:10], last_used, state)
    output().print(table)
    return EXIT_DONE


@keys_app.command("revoke")
@async_command
async def revoke_key(
    key_id: Annotated[str, typer.Argument(help="The key's id, from `octollm keys list`.")], as_json: AsJson = False
) -> int:
    """Revoke an API key and every token issued for it."""
    async with open_client(command_settings()) as client:
        await client.admin.revoke_key(key_id)
    if as_json:
        print_json({"id": key_id, "state": "revoked"})
    else:
        output().print(Text(f"Key {key_id} is revoked."))
    return EXIT_DONE


@keys_app.command("provision")
@async_command
async def provision_folder(
    folder: Annotated[Path, typer.Argument(help="The folder in which to create a folder for each service.")],
    as_json: AsJson = False,
) -> int:
    """Create the keys of an installation with separate services: a folder for each service.

    Give each service its folder as OCTOLLM_KEYS. The folder of the orchestrator also has the root key, and local.key,
    the first API key. Existing keys are kept.
    """
    files = await asyncio.to_thread(provision_keys, folder, Uuid7Generator(SystemClock()))
    if as_json:
        print_json({"written": [str(path) for path in files]})
        return EXIT_DONE
    for path in files:
        output().print(Text(str(path)))
    if not files:
        messages().print(Text("All keys are there already.", "octo.quiet"))
    return EXIT_DONE


@keys_app.command("rotate")
@async_command
async def rotate_key(
    name: Annotated[str, typer.Argument(help="A built-in service, or root.")],
    folder: Annotated[
        Path | None,
        typer.Option(help="The folder of `octollm keys provision`; else the keys of the home.", metavar="PATH"),
    ] = None,
    at_once: Annotated[
        bool, typer.Option("--at-once", help="The old key may be compromised: distrust it immediately.")
    ] = False,
    as_json: AsJson = False,
) -> int:
    """Create a new key for a service, or a new root key, without downtime.

    Restart the orchestrator, then the service, within ten minutes; the new key signs from then on, and the old one is
    trusted until the last token that it signed has expired.
    """
    clock = SystemClock()
    ids = Uuid7Generator(clock)
    if folder is not None:
        result = await asyncio.to_thread(rotate_signing_key, folder, name, ids, clock.now(), is_compromised=at_once)
    else:
        async with open_keys(command_settings().home) as home:
            result = await asyncio.to_thread(
                rotate_signing_key, home.keys, name, ids, clock.now(), is_compromised=at_once
            )
    if as_json:
        print_json(result)
    else:
        _print_rotation(result, at_once=at_once)
    return EXIT_DONE


def _print_rotation(result: KeyRotationResult, *, at_once: bool) -> None:
    console = output()
    for path in result.files:
        console.print(Text(f"Wrote {path}"))
    console.print(Text(f"The new key of {result.name} is {result.fresh}."))
    # The orchestrator issues what the others verify: it has to know the new key first.
    order = "the orchestrator" if result.name in (ROOT, "orchestrator") else f"the orchestrator, then {result.name}"
    if at_once:
        console.print(Text(f"Restart {order} now: {result.before} is no longer trusted.", "octo.warn"))
        if result.name == ROOT:
            rest = "Restart every other service, too. Tokens, enrolment tokens and grants of the old key are void."
        else:
            rest = f"Revoke the grants to the old key: octollm token revoke --service {result.name}"
        console.print(Text(rest, "octo.warn"))
        return
    console.print(
        Text(f"Restart {order} before {format_rfc3339(result.signs_at)[:19]}Z, when the new key begins to sign.")
    )
    console.print(Text(f"{result.before} is trusted until {format_rfc3339(result.until)[:19]}Z.", "octo.quiet"))


@keys_app.command("join", hidden=True)
@keys_app.command("enrol")
@async_command
async def create_enrolment_token(
    name: Annotated[str, typer.Option(help="The one name that the token admits.")],
    calls: Annotated[
        str,
        typer.Option(help='The calls that the arm may declare at most, e.g. "retriever:search models:chat".'),
    ] = "",
    lifetime: Annotated[int, typer.Option(help="Seconds until it expires.", min=1, max=2_592_000)] = 86_400,
    as_json: AsJson = False,
) -> int:
    """Create an enrolment token for an arm of your own and print it; it is shown only once."""
    async with open_client(command_settings()) as client:
        new = await client.admin.create_enrolment_token(name, calls=calls.split(), lifetime_seconds=lifetime)
    if as_json:
        print_json(new)
        return EXIT_DONE
    admitted = ", ".join(new.join.calls) or "no calls"
    messages().print(
        Text(
            f"Enrolment token {new.join.id} for {new.join.name} ({admitted}), until {new.join.expires_at}."
            " Give it to the arm as OCTOLLM_ENROLMENT_TOKEN. It is shown this once:"
        )
    )
    print(new.secret, flush=True)
    return EXIT_DONE


@keys_app.command("joins", hidden=True)
@keys_app.command("enrolments")
@async_command
async def list_enrolment_tokens(as_json: AsJson = False) -> int:
    """List enrolment tokens, without their secrets."""
    async with open_client(command_settings()) as client:
        listing = EnrolmentTokenList(await client.admin.enrolment_tokens())
    if as_json:
        print_json(listing)
        return EXIT_DONE
    table = Table(box=None)
    for column in ("Id", "Arm", "Calls", "Until", "Used", "State"):
        table.add_column(column, no_wrap=column in ("Id", "State"), overflow="fold")
    for token in listing.joins:
        calls, used_at = ", ".join(token.calls), (token.used_at or "")[:10]
        table.add_row(token.id, Text(token.name), Text(calls), token.expires_at[:16], used_at, token.state)
    output().print(table)
    return EXIT_DONE


@keys_app.command("revoke-join", hidden=True)
@keys_app.command("revoke-enrolment")
@async_command
async def revoke_enrolment_token(
    token_id: Annotated[str, typer.Argument(help="The token's id, from `octollm keys enrolments`.")],
    as_json: AsJson = False,
) -> int:
    """Revoke an enrolment token; an arm that enrolled with it stays, see `octollm arms remove`."""
    async with open_client(command_settings()) as client:
        await client.admin.revoke_enrolment_token(token_id)
    if as_json:
        print_json({"id": token_id, "state": "revoked"})
    else:
        output().print(Text(f"Enrolment token {token_id} is revoked. An arm that joined with it stays."))
    return EXIT_DONE
