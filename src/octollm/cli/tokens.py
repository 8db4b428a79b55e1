"""`octollm token`: mint a token for direct calls, inspect its chain of delegation, revoke it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.text import Text

from octollm.capability import CapabilityError, PublicKey
from octollm.capability.inspection import Hop, Inspection, explain_reason, find_refusal_reason, inspect, read_chain
from octollm.cli.keys import create_key
from octollm.cli.output import output
from octollm.cli.runtime import (
    EXIT_DONE,
    EXIT_FAILED,
    AsJson,
    async_command,
    command_settings,
    open_client,
    print_json,
)
from octollm.clock import Clock, SystemClock, format_rfc3339
from octollm.errors import OctoError, SettingError
from octollm.installation.provisioning import load_trusted_roots

_MAX_TOKEN_CHARS = 65_536

app = typer.Typer()
token_app = typer.Typer(
    name="token", help="Make API keys, and tokens for direct calls; inspect and revoke them.", no_args_is_help=True
)
app.add_typer(token_app, rich_help_panel="Access")
token_app.command("create")(create_key)


class TokenVerdict(msgspec.Struct, frozen=True):
    """Whether a service would accept the token; ``reason`` is a code and ``why`` explains it, both empty if so."""

    service: str
    accepted: bool
    reason: str = ""
    why: str = ""


class TokenReport(msgspec.Struct, frozen=True):
    """The JSON document of ``token inspect --json``."""

    says: Inspection
    verdicts: tuple[TokenVerdict, ...]


@token_app.command("mint")
@async_command
async def mint_token(
    scope: Annotated[str, typer.Option(help='Scopes, separated by spaces, e.g. "coder:execute".')],
    aud: Annotated[str, typer.Option(help="The one service that accepts the token, e.g. coder.", metavar="SERVICE")],
    lifetime: Annotated[int, typer.Option(help="Seconds until it expires.", min=1, max=3600)] = 3600,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with its lifetime.")] = False,
) -> int:
    """Print a token for direct calls to one service, and nothing else."""
    async with open_client(command_settings()) as client:
        response = await client.admin.mint_token(scope, aud=aud, lifetime_seconds=lifetime)
    if as_json:
        print_json(response)
    else:
        print(response.access_token, flush=True)
    return EXIT_DONE


@token_app.command("inspect")
@async_command
async def inspect_token(
    token: Annotated[str, typer.Argument(help="The token, or - to read it from standard input.")],
    service: Annotated[
        list[str] | None,
        typer.Option("--for", help="Say whether this service would accept it; may be repeated.", metavar="SERVICE"),
    ] = None,
    roots: Annotated[
        Path | None, typer.Option(help="The root keys to trust, a JWK Set; else those of this machine.", metavar="PATH")
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Show the delegation chain of a token: each hop's issuer and holder, the dropped and the remaining authority.

    It also says which services would refuse the token. Nothing is sent anywhere. Exit code 1 when one would.
    """
    bearer = _read_token(token)
    clock = SystemClock()
    try:
        inspection = inspect(bearer)
    except CapabilityError as error:
        raise OctoError(
            f"That is not a capability token ({error.reason}): {explain_reason(error.reason)}",
            code="invalid_parameter",
        ) from error
    trusted = _load_roots(roots)
    services = tuple(service or (inspection.audience,))
    verdicts = () if trusted is None else tuple(_check_service(bearer, name, trusted, clock) for name in services)
    if as_json:
        print_json(TokenReport(inspection, verdicts))
    else:
        _print_chain(inspection, output(), clock.now())
        _print_verdicts(verdicts, output())
    return EXIT_DONE if all(verdict.accepted for verdict in verdicts) else EXIT_FAILED


@token_app.command("revoke")
@async_command
async def revoke_token(
    token: Annotated[
        str | None, typer.Argument(help="The token, its jti, or - to read it from standard input.")
    ] = None,
    service: Annotated[str | None, typer.Option(help="Revoke every grant to this service until now.")] = None,
    principal: Annotated[
        str | None, typer.Option(help="Revoke every token of this principal until now, and cancel its tasks.")
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Revoke a token with everything derived from it, or the grants to a service or principal.

    Every service refuses it within a second.
    """
    if sum(value is not None for value in (token, service, principal)) != 1:
        raise OctoError("Give exactly one of: a token, --service, --principal.", code="invalid_parameter")
    text = "" if token is None else _read_token(token)
    # Every link of a chain is revoked: a sibling minted from the same parent must not survive.
    ids = [link.jti for link in read_chain(text).links] if "." in text else [text] if text else []
    async with open_client(command_settings()) as client:
        for jti in ids:
            await client.admin.revoke_token(jti)
        if service is not None:
            await client.admin.revoke_service(service)
        if principal is not None:
            await client.admin.revoke_principal(principal)
    revoked = [*ids, *(name for name in (service, principal) if name is not None)]
    if as_json:
        print_json({"revoked": revoked})
    else:
        output().print(Text(f"Revoked: {', '.join(revoked)}. Every service refuses it within a second."))
    return EXIT_DONE


def _read_token(token: str) -> str:
    """Return the token; ``-`` reads it from standard input, so that it is in no process list and no shell history."""
    text = sys.stdin.read(_MAX_TOKEN_CHARS) if token == "-" else token  # noqa: S105  the usual name of standard input
    return text.strip().removeprefix("Bearer ").strip()


def _load_roots(file: Path | None) -> Mapping[str, PublicKey] | None:
    try:
        return load_trusted_roots(command_settings(), file)
    except SettingError:
        if file is not None:
            raise
        return None


def _check_service(bearer: str, service: str, roots: Mapping[str, PublicKey], clock: Clock) -> TokenVerdict:
    reason = find_refusal_reason(bearer, service, roots, clock)
    return TokenVerdict(service, reason is None, reason or "", "" if reason is None else explain_reason(reason))


def _print_chain(inspection: Inspection, console: Console, now: float) -> None:
    owner = f"{inspection.subject} (credential {inspection.credential}, tenant {inspection.tenant})"
    console.print(Text.assemble(("For      ", "octo.title"), owner))
    if inspection.task is not None:
        task = inspection.task
        fields = (("step", task.step), ("attempt", task.attempt), ("run", task.run))
        rest = "".join(f", {name} {value}" for name, value in fields if value is not None)
        console.print(Text.assemble(("Work     ", "octo.title"), f"{task.task}{rest}"))
    console.print(
        Text.assemble(("Size     ", "octo.title"), f"{inspection.chars:,} characters, {len(inspection.hops)} tokens")
    )
    console.print()
    for depth, hop in enumerate(inspection.hops):
        _print_hop(hop, console, "  " * depth, now)


def _print_hop(hop: Hop, console: Console, indent: str, now: float) -> None:
    remaining = hop.expires - now
    until = f"until {format_rfc3339(hop.expires)[:19]}Z, {_format_remaining(remaining)}"
    style = "octo.step" if remaining > 0 else "octo.bad"
    title = Text.assemble(indent, (f"{hop.issuer} → {hop.holder}", style), f"  {hop.kind}, {until}")
    console.print(title)
    lead = "may ask" if hop.kind == "grant" else "may do"
    for number, path in enumerate(hop.allows):
        console.print(Text(f"{indent}  {lead if number == 0 else ' ' * len(lead)}  {path}", "octo.good"))
    for number, path in enumerate(hop.dropped):
        console.print(Text(f"{indent}  {'dropped' if number == 0 else ' ' * 7}  {path}", "octo.quiet"))
    if hop.kind == "grant":
        hops = f"{hop.hops} call{'' if hop.hops == 1 else 's'} deep at most"
        console.print(Text(f"{indent}  left     {hops}, by the holder of the key that it names", "octo.quiet"))
    console.print(Text(f"{indent}  jti {hop.jti}, signed by {hop.key}", "octo.quiet"))


def _format_remaining(seconds: float) -> str:
    if seconds <= 0:
        return f"expired {-seconds:.0f} s ago"
    return f"{seconds:.0f} s left" if seconds < 120 else f"{seconds / 60:.0f} min left"


def _print_verdicts(verdicts: tuple[TokenVerdict, ...], console: Console) -> None:
    console.print()
    if not verdicts:
        console.print(
            Text(
                "No root key is known on this machine, so no signature was verified; name it with --roots.", "octo.warn"
            )
        )
    for verdict in verdicts:
        if verdict.accepted:
            console.print(Text(f"✓ {verdict.service} takes it, unless it was revoked.", "octo.good"))
        else:
            console.print(Text(f"✗ {verdict.service} refuses it: {verdict.reason}. {verdict.why}", "octo.bad"))
