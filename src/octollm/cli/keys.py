"""`octollm keys`: API keys, signing keys of services, and enrolment tokens for arms."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.table import Table
from rich.text import Text

from octollm.cli.completion import complete_model
from octollm.cli.output import messages, output
from octollm.cli.runtime import EXIT_DONE, command_settings, open_client, run_command
from octollm.clock import SystemClock, Uuid7Generator, format_rfc3339
from octollm.contracts.auth import KeyList
from octollm.contracts.enrolment import EnrolmentTokenList
from octollm.installation.home import open_keys
from octollm.installation.provisioning import ROOT, KeyRotationResult, rotate_signing_key

models_app = typer.Typer(name="models", help="Fetch and list the embedded models.", no_args_is_help=True)
keys_app = typer.Typer(name="keys", help="Make, list and revoke API keys and join secrets.", no_args_is_help=True)
token_app = typer.Typer(
    name="token", help="Make API keys, and tokens for direct calls; look into and revoke them.", no_args_is_help=True
)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@models_app.command("pull")
def pull_model(
    name: Annotated[
        str | None,
        typer.Argument(help="A name of `octollm models list`; else the smallest.", autocompletion=complete_model),
    ] = None,
    source: Annotated[
        Path | None,
        typer.Option("--from", help="Take the model from this file, not the network.", metavar="PATH"),
    ] = None,
) -> None:
    """Fetch an embedded model into the cache; what was fetched before an interruption is kept."""
    from octollm.cli.models import pull_model_command  # noqa: PLC0415

    raise typer.Exit(pull_model_command(name, source))


@models_app.command("list")
def list_models(as_json: AsJson = False) -> None:
    """List the embedded models: which are here, and which one is used."""
    from octollm.cli.models import list_models_command  # noqa: PLC0415

    raise typer.Exit(list_models_command(as_json=as_json))


@token_app.command("create")
@keys_app.command("create")
def create_key(
    name: Annotated[str, typer.Argument(help="What the key is for.")] = "key",
    scope: Annotated[str, typer.Option(help="Presets (user, admin) and scopes, separated by spaces.")] = "user",
    tenant: Annotated[
        str | None, typer.Option(help="Another tenant's: for whoever runs the installation, to let it begin.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make an API key and print its secret, this once."""
    raise typer.Exit(create_key_command(name, scope, tenant, as_json=as_json))


@keys_app.command("list")
def list_keys(as_json: AsJson = False) -> None:
    """List API keys, without their secrets."""
    raise typer.Exit(list_keys_command(as_json=as_json))


@keys_app.command("revoke")
def revoke_key(
    key_id: Annotated[str, typer.Argument(help="The key's id, from `octollm keys list`.")], as_json: AsJson = False
) -> None:
    """Revoke an API key; its tokens end with it."""
    raise typer.Exit(revoke_key_command(key_id, as_json=as_json))


@keys_app.command("provision")
def provision_folder(
    folder: Annotated[Path, typer.Argument(help="Where to make a folder for each service.")], as_json: AsJson = False
) -> None:
    """Make the keys of an installation whose services run apart: a folder for each, with what that one needs.

    Give each service its folder as OCTOLLM_KEYS. The folder of the orchestrator has the root key, and local.key, the
    first API key. Keys that are there are kept.
    """
    from octollm.cli.serve import provision_command  # noqa: PLC0415

    raise typer.Exit(provision_command(folder, as_json=as_json))


@keys_app.command("rotate")
def rotate_key(
    name: Annotated[str, typer.Argument(help="A built-in service, or root.")],
    folder: Annotated[
        Path | None,
        typer.Option(help="What `octollm keys provision` made; else the keys of the home.", metavar="PATH"),
    ] = None,
    at_once: Annotated[
        bool, typer.Option("--at-once", help="The old key may be in other hands: believe it no more.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Make a new key for a service, or a new root key, that takes over from the old one without a gap.

    Start the orchestrator again, then the service, within ten minutes; the new key signs from then on, and the old
    one is believed until the last token that it signed has expired.
    """
    raise typer.Exit(rotate_command(name, folder, at_once=at_once, as_json=as_json))


@keys_app.command("join")
def create_enrolment_token(
    name: Annotated[str, typer.Option(help="The one name that the secret admits.")],
    calls: Annotated[
        str,
        typer.Option(help='The most that the arm may declare to call, e.g. "retriever:search models:chat".'),
    ] = "",
    lifetime: Annotated[int, typer.Option(help="Seconds until it ends.", min=1, max=2_592_000)] = 86_400,
    as_json: AsJson = False,
) -> None:
    """Make a secret with which an arm of one's own joins, and print it, this once."""
    raise typer.Exit(create_enrolment_token_command(name, calls, lifetime, as_json=as_json))


@keys_app.command("joins")
def list_enrolment_tokens(as_json: AsJson = False) -> None:
    """List join secrets, without what is secret of them."""
    raise typer.Exit(list_enrolment_tokens_command(as_json=as_json))


@keys_app.command("revoke-join")
def revoke_enrolment_token(
    token_id: Annotated[str, typer.Argument(help="The secret's id, from `octollm keys joins`.")],
    as_json: AsJson = False,
) -> None:
    """Revoke a join secret; an arm that joined with it stays, see `octollm arms remove`."""
    raise typer.Exit(revoke_enrolment_token_command(token_id, as_json=as_json))


@token_app.command("mint")
def mint_token(
    scope: Annotated[str, typer.Option(help='Scopes, separated by spaces, e.g. "coder:execute".')],
    aud: Annotated[str, typer.Option(help="The one service that takes the token, e.g. coder.", metavar="SERVICE")],
    lifetime: Annotated[int, typer.Option(help="Seconds until it ends.", min=1, max=3600)] = 3600,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with when it ends.")] = False,
) -> None:
    """Print a token for direct calls to one service, and nothing else."""
    raise typer.Exit(mint_token_command(scope, aud, lifetime, as_json=as_json))


@token_app.command("inspect")
def inspect_token(
    token: Annotated[str, typer.Argument(help="The token, or - to read it from standard input.")],
    service: Annotated[
        list[str] | None,
        typer.Option("--for", help="Say whether this service would take it; may be repeated.", metavar="SERVICE"),
    ] = None,
    roots: Annotated[
        Path | None, typer.Option(help="The root keys to trust, a JWK Set; else those of this machine.", metavar="PATH")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Draw the chain of a token: who lent what to whom, what each hop dropped, what is left, and who refuses it.

    Nothing is sent anywhere. Exit code 1 when a service would refuse it.
    """
    from octollm.cli.tokens import inspect_token_command  # noqa: PLC0415

    raise typer.Exit(inspect_token_command(token, services=tuple(service or ()), roots=roots, as_json=as_json))


@token_app.command("revoke")
def revoke_token(
    token: Annotated[
        str | None, typer.Argument(help="The token, its jti, or - to read it from standard input.")
    ] = None,
    service: Annotated[str | None, typer.Option(help="Revoke what this service was lent until now.")] = None,
    principal: Annotated[
        str | None, typer.Option(help="Revoke what this principal was given until now, and cancel its tasks.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Revoke a token with all that was minted under it, or what a service or principal was lent.

    Every service refuses it within a second.
    """
    from octollm.cli.tokens import revoke_token_command  # noqa: PLC0415

    raise typer.Exit(revoke_token_command(token, service=service, principal=principal, as_json=as_json))


def create_key_command(name: str, scope: str, tenant: str | None, *, as_json: bool) -> int:
    """Make a key; its secret is all that goes to standard output, so that it can be taken from there."""

    async def work() -> int:
        async with open_client(command_settings()) as octo:
            made = await octo.create_key(name, scope=scope, tenant=tenant)
        if as_json:
            print(msgspec.json.encode(made).decode(), flush=True)
            return EXIT_DONE
        messages().print(Text(f"Key {made.key.id} ({made.key.name}: {made.key.scope}). It is shown this once:"))
        print(made.secret, flush=True)
        return EXIT_DONE

    return run_command(work)


def list_keys_command(*, as_json: bool) -> int:
    """List keys."""

    async def work() -> int:
        async with open_client(command_settings()) as octo:
            keys = await octo.keys()
        if as_json:
            print(msgspec.json.encode(KeyList(keys)).decode())
            return EXIT_DONE
        table = Table(box=None)
        for column in ("Id", "Name", "Scope", "Made", "Last used", "State"):
            table.add_column(column, no_wrap=column in ("Id", "State"), overflow="fold")
        for key in keys:
            state = "revoked" if key.revoked_at else "good"
            table.add_row(
                key.id, Text(key.name), Text(key.scope), key.created_at[:10], (key.last_used_at or "")[:10], state
            )
        output().print(table)
        return EXIT_DONE

    return run_command(work)


def revoke_key_command(key_id: str, *, as_json: bool) -> int:
    """Revoke a key."""

    async def work() -> int:
        async with open_client(command_settings()) as octo:
            await octo.revoke_key(key_id)
        if as_json:
            print(msgspec.json.encode({"id": key_id, "state": "revoked"}).decode())
        else:
            output().print(Text(f"Key {key_id} is revoked."))
        return EXIT_DONE

    return run_command(work)


def mint_token_command(scope: str, aud: str, lifetime: int, *, as_json: bool) -> int:
    """Print a token alone."""

    async def work() -> int:
        async with open_client(command_settings()) as octo:
            answer = await octo.mint_token(scope, aud=aud, lifetime_seconds=lifetime)
        print(msgspec.json.encode(answer).decode() if as_json else answer.access_token, flush=True)
        return EXIT_DONE

    return run_command(work)


def create_enrolment_token_command(name: str, calls: str, lifetime: int, *, as_json: bool) -> int:
    """Make a join secret; it is all that goes to standard output, so that it can be taken from there."""

    async def work() -> int:
        async with open_client(command_settings()) as octo:
            made = await octo.create_enrolment_token(name, calls=calls.split(), lifetime_seconds=lifetime)
        if as_json:
            print(msgspec.json.encode(made).decode(), flush=True)
            return EXIT_DONE
        admitted = ", ".join(made.join.calls) or "no calls"
        messages().print(
            Text(
                f"Join secret {made.join.id} for {made.join.name} ({admitted}), until {made.join.expires_at}."
                " Give it to the arm as OCTOLLM_ENROLMENT_TOKEN. It is shown this once:"
            )
        )
        print(made.secret, flush=True)
        return EXIT_DONE

    return run_command(work)


def list_enrolment_tokens_command(*, as_json: bool) -> int:
    """List join secrets."""

    async def work() -> int:
        async with open_client(command_settings()) as octo:
            found = EnrolmentTokenList(await octo.enrolment_tokens())
        if as_json:
            print(msgspec.json.encode(found).decode())
            return EXIT_DONE
        table = Table(box=None)
        for column in ("Id", "Arm", "Calls", "Until", "Used", "State"):
            table.add_column(column, no_wrap=column in ("Id", "State"), overflow="fold")
        for join in found.joins:
            calls, used = ", ".join(join.calls), (join.used_at or "")[:10]
            table.add_row(join.id, Text(join.name), Text(calls), join.expires_at[:16], used, join.state)
        output().print(table)
        return EXIT_DONE

    return run_command(work)


def revoke_enrolment_token_command(token_id: str, *, as_json: bool) -> int:
    """Revoke a join secret."""

    async def work() -> int:
        async with open_client(command_settings()) as octo:
            await octo.revoke_enrolment_token(token_id)
        if as_json:
            print(msgspec.json.encode({"id": token_id, "state": "revoked"}).decode())
        else:
            output().print(Text(f"Join secret {token_id} is revoked. An arm that joined with it stays."))
        return EXIT_DONE

    return run_command(work)


def rotate_command(name: str, folder: Path | None, *, at_once: bool, as_json: bool) -> int:
    """Make a new key, and say what to do next."""

    async def work() -> int:
        clock = SystemClock()
        ids = Uuid7Generator(clock)
        if folder is not None:
            done = await asyncio.to_thread(rotate_signing_key, folder, name, ids, clock.now(), is_compromised=at_once)
        else:
            async with open_keys(command_settings().home) as home:
                done = await asyncio.to_thread(
                    rotate_signing_key, home.keys, name, ids, clock.now(), is_compromised=at_once
                )
        if as_json:
            print(msgspec.json.encode(done, enc_hook=str).decode())
        else:
            _print_rotation(done, at_once=at_once)
        return EXIT_DONE

    return run_command(work)


def _print_rotation(done: KeyRotationResult, *, at_once: bool) -> None:
    console = output()
    for path in done.written:
        console.print(Text(f"Wrote {path}"))
    console.print(Text(f"The new key of {done.name} is {done.fresh}."))
    order = "the orchestrator" if done.name in (ROOT, "orchestrator") else f"the orchestrator, then {done.name}"
    if at_once:
        console.print(Text(f"Start {order} again now: {done.before} is believed no more.", "octo.warn"))
        if done.name == ROOT:
            every = "Start every other service again, too. Tokens, join secrets and grants of the old key are over."
            console.print(Text(every, "octo.warn"))
        else:
            lent = f"End what was lent to the old key: octollm token revoke --service {done.name}"
            console.print(Text(lent, "octo.warn"))
        return
    console.print(
        Text(f"Start {order} again before {format_rfc3339(done.signs_at)[:19]}Z, when the new key begins to sign.")
    )
    console.print(Text(f"{done.before} is believed until {format_rfc3339(done.until)[:19]}Z.", "octo.quiet"))
