"""The commands on models, API keys and tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from octollm.cli.completing import complete_model

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
    from octollm.cli.model_views import pull_model_command  # noqa: PLC0415

    raise typer.Exit(pull_model_command(name, source))


@models_app.command("list")
def list_models(as_json: AsJson = False) -> None:
    """List the embedded models: which are here, and which one is used."""
    from octollm.cli.model_views import list_models_command  # noqa: PLC0415

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
    from octollm.cli.key_views import create_key_command  # noqa: PLC0415

    raise typer.Exit(create_key_command(name, scope, tenant, as_json=as_json))


@keys_app.command("list")
def list_keys(as_json: AsJson = False) -> None:
    """List API keys, without their secrets."""
    from octollm.cli.key_views import list_keys_command  # noqa: PLC0415

    raise typer.Exit(list_keys_command(as_json=as_json))


@keys_app.command("revoke")
def revoke_key(
    key_id: Annotated[str, typer.Argument(help="The key's id, from `octollm keys list`.")], as_json: AsJson = False
) -> None:
    """Revoke an API key; its tokens end with it."""
    from octollm.cli.key_views import revoke_key_command  # noqa: PLC0415

    raise typer.Exit(revoke_key_command(key_id, as_json=as_json))


@keys_app.command("provision")
def provision_folder(
    folder: Annotated[Path, typer.Argument(help="Where to make a folder for each service.")], as_json: AsJson = False
) -> None:
    """Make the keys of an installation whose services run apart: a folder for each, with what that one needs.

    Give each service its folder as OCTOLLM_KEYS. The folder of the orchestrator has the root key, and local.key, the
    first API key. Keys that are there are kept.
    """
    from octollm.cli.serving import provision_command  # noqa: PLC0415

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
    from octollm.cli.rotating import rotate_command  # noqa: PLC0415

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
    from octollm.cli.join_views import create_enrolment_token_command  # noqa: PLC0415

    raise typer.Exit(create_enrolment_token_command(name, calls, lifetime, as_json=as_json))


@keys_app.command("joins")
def list_enrolment_tokens(as_json: AsJson = False) -> None:
    """List join secrets, without what is secret of them."""
    from octollm.cli.join_views import list_enrolment_tokens_command  # noqa: PLC0415

    raise typer.Exit(list_enrolment_tokens_command(as_json=as_json))


@keys_app.command("revoke-join")
def revoke_enrolment_token(
    token_id: Annotated[str, typer.Argument(help="The secret's id, from `octollm keys joins`.")],
    as_json: AsJson = False,
) -> None:
    """Revoke a join secret; an arm that joined with it stays, see `octollm arms remove`."""
    from octollm.cli.join_views import revoke_enrolment_token_command  # noqa: PLC0415

    raise typer.Exit(revoke_enrolment_token_command(token_id, as_json=as_json))


@token_app.command("mint")
def mint_token(
    scope: Annotated[str, typer.Option(help='Scopes, separated by spaces, e.g. "coder:execute".')],
    aud: Annotated[str, typer.Option(help="The one service that takes the token, e.g. coder.", metavar="SERVICE")],
    lifetime: Annotated[int, typer.Option(help="Seconds until it ends.", min=1, max=3600)] = 3600,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with when it ends.")] = False,
) -> None:
    """Print a token for direct calls to one service, and nothing else."""
    from octollm.cli.key_views import mint_token_command  # noqa: PLC0415

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
    from octollm.cli.token_views import inspect_token_command  # noqa: PLC0415

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
    from octollm.cli.token_views import revoke_token_command  # noqa: PLC0415

    raise typer.Exit(revoke_token_command(token, service=service, principal=principal, as_json=as_json))
