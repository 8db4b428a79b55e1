"""`octollm token`: mint a token for direct calls, inspect its chain of delegation, revoke it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import msgspec
from rich.console import Console
from rich.text import Text

from octollm.capability import CapabilityError, PublicKey
from octollm.capability.inspection import Hop, Inspection, explain_reason, find_refusal_reason, inspect, read_chain
from octollm.cli.output import output
from octollm.cli.runtime import EXIT_DONE, EXIT_FAILED, command_settings, open_client, run_command
from octollm.clock import Clock, SystemClock, format_rfc3339
from octollm.errors import OctoError, SettingError
from octollm.installation.provisioning import load_trusted_roots

_MAX_TOKEN_CHARS = 65_536


class TokenVerdict(msgspec.Struct, frozen=True):
    """Whether a service would take the token; ``reason`` is why not, empty when it would."""

    service: str
    accepted: bool
    reason: str = ""
    why: str = ""


class TokenReport(msgspec.Struct, frozen=True):
    """What ``--json`` prints."""

    says: Inspection
    verdicts: tuple[TokenVerdict, ...]


def inspect_token_command(token: str, *, services: tuple[str, ...], roots: Path | None, as_json: bool) -> int:
    """Draw a token's chain. Nothing leaves this machine."""

    async def work() -> int:
        bearer = _read_token(token)
        clock = SystemClock()
        try:
            says = inspect(bearer)
        except CapabilityError as error:
            raise OctoError(
                f"That is no capability token ({error.reason}): {explain_reason(error.reason)}",
                code="invalid_parameter",
            ) from error
        known = _load_roots(roots)
        asked = services or (says.audience,)
        verdicts = () if known is None else tuple(_check_service(bearer, service, known, clock) for service in asked)
        if as_json:
            print(msgspec.json.encode(TokenReport(says, verdicts)).decode())
        else:
            _print_chain(says, output(), clock.now())
            _print_verdicts(verdicts, output())
        return EXIT_DONE if all(each.accepted for each in verdicts) else EXIT_FAILED

    return run_command(work)


def revoke_token_command(token: str | None, *, service: str | None, principal: str | None, as_json: bool) -> int:
    """Revoke a token, a service or a principal. Of a token it is every link, so that nothing under it goes on."""

    async def work() -> int:
        if sum(each is not None for each in (token, service, principal)) != 1:
            raise OctoError("Name one thing: a token, --service or --principal.", code="invalid_parameter")
        text = "" if token is None else _read_token(token)
        ids = [link.jti for link in read_chain(text).links] if "." in text else [text] if text else []
        async with open_client(command_settings()) as octo:
            for jti in ids:
                await octo.revoke_token(jti)
            if service is not None:
                await octo.revoke_service(service)
            if principal is not None:
                await octo.revoke_principal(principal)
        revoked = [*ids, *(each for each in (service, principal) if each is not None)]
        if as_json:
            print(msgspec.json.encode({"revoked": revoked}).decode())
        else:
            output().print(Text(f"Revoked: {', '.join(revoked)}. Every service refuses it within a second."))
        return EXIT_DONE

    return run_command(work)


def _read_token(token: str) -> str:
    """Return the token; ``-`` reads it from standard input, where no list of processes shows it."""
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


def _print_chain(says: Inspection, console: Console, now: float) -> None:
    who = f"{says.subject} (credential {says.credential}, tenant {says.tenant})"
    console.print(Text.assemble(("For      ", "octo.title"), who))
    if says.task is not None:
        work = says.task
        named = (("step", work.step), ("attempt", work.attempt), ("run", work.run))
        rest = "".join(f", {name} {value}" for name, value in named if value is not None)
        console.print(Text.assemble(("Work     ", "octo.title"), f"{work.task}{rest}"))
    console.print(Text.assemble(("Size     ", "octo.title"), f"{says.chars:,} characters, {len(says.hops)} tokens"))
    console.print()
    for depth, hop in enumerate(says.hops):
        _print_hop(hop, console, "  " * depth, now)


def _print_hop(hop: Hop, console: Console, indent: str, now: float) -> None:
    left = hop.expires - now
    until = f"until {format_rfc3339(hop.expires)[:19]}Z, {_format_remaining(left)}"
    style = "octo.step" if left > 0 else "octo.bad"
    title = Text.assemble(indent, (f"{hop.issuer} → {hop.holder}", style), f"  {hop.kind}, {until}")
    console.print(title)
    lead = "may ask" if hop.kind == "grant" else "may do"
    for number, path in enumerate(hop.allows):
        console.print(Text(f"{indent}  {lead if number == 0 else ' ' * len(lead)}  {path}", "octo.good"))
    for number, path in enumerate(hop.dropped):
        console.print(Text(f"{indent}  {'dropped' if number == 0 else ' ' * 7}  {path}", "octo.quiet"))
    if hop.kind == "grant":
        hops = f"{hop.hops} call{'' if hop.hops == 1 else 's'} deep at most"
        console.print(Text(f"{indent}  left     {hops}, by whoever has the key that it confirms", "octo.quiet"))
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
                "No root key is known on this machine, so nothing of this is proved; name it with --roots.", "octo.warn"
            )
        )
    for each in verdicts:
        if each.accepted:
            console.print(Text(f"✓ {each.service} takes it, unless it was revoked.", "octo.good"))
        else:
            console.print(Text(f"✗ {each.service} refuses it: {each.reason}. {each.why}", "octo.bad"))
