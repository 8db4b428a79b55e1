"""`octollm webhooks`: events of the installation, delivered to other systems."""

from __future__ import annotations

from typing import Annotated, cast

import typer
from rich.table import Table
from rich.text import Text

from octollm.cli.output import messages, output
from octollm.cli.runtime import EXIT_DONE, EXIT_FAILED, AsJson, async_command, command_settings, open_client, print_json
from octollm.contracts.webhooks import (
    DeliveryState,
    NewWebhook,
    WebhookFormat,
    WebhookList,
    WebhookRequest,
    WebhookView,
)

app = typer.Typer()
webhooks_app = typer.Typer(
    name="webhooks", help="Manage webhooks, which deliver events to other systems.", no_args_is_help=True
)
app.add_typer(webhooks_app, rich_help_panel="Installation")

WebhookId = Annotated[str, typer.Argument(help="The webhook's id, from `octollm webhooks list`.")]


@webhooks_app.command("create")
@async_command
async def create_webhook(
    url: Annotated[str, typer.Argument(help="The receiver: https, at a public address.")],
    pattern: Annotated[list[str], typer.Option(help="Events by channel, such as events:task:*; may be repeated.")],
    body_format: Annotated[
        str, typer.Option("--format", help="octollm, cloudevents, or cloudevents-binary.")
    ] = "octollm",
    description: Annotated[str, typer.Option(help="The purpose of the webhook.")] = "",
    as_json: AsJson = False,
) -> int:
    """Create a webhook for future events, and print its secret, which is shown only once."""
    request = WebhookRequest(url, tuple(pattern), format=cast("WebhookFormat", body_format), description=description)
    async with open_client(command_settings()) as client:
        return _print_new(await client.admin.create_webhook(request), as_json=as_json)


@webhooks_app.command("list")
@async_command
async def list_webhooks(as_json: AsJson = False) -> int:
    """List webhooks, without their secrets."""
    async with open_client(command_settings()) as client:
        found = await client.admin.webhooks()
    if as_json:
        print_json(WebhookList(found))
        return EXIT_DONE
    table = Table(box=None)
    for column in ("Id", "State", "Pending", "Dead", "URL", "Events"):
        table.add_column(column, no_wrap=column in ("Id", "State"), overflow="fold")
    for each in found:
        counts = str(each.pending), str(each.dead)
        table.add_row(each.id, each.state, *counts, Text(each.url), Text(", ".join(each.patterns)))
    output().print(table)
    return EXIT_DONE


@webhooks_app.command("show")
@async_command
async def show_webhook(webhook_id: WebhookId) -> int:
    """Print a webhook as JSON."""
    async with open_client(command_settings()) as client:
        print_json(await client.admin.webhook(webhook_id))
    return EXIT_DONE


@webhooks_app.command("enable")
@async_command
async def enable_webhook(webhook_id: WebhookId, as_json: AsJson = False) -> int:
    """Enable a webhook for future events; `replay` delivers older ones."""
    return await _set_enabled(webhook_id, enabled=True, as_json=as_json)


@webhooks_app.command("disable")
@async_command
async def disable_webhook(webhook_id: WebhookId, as_json: AsJson = False) -> int:
    """Disable a webhook; its pending deliveries become dead letters."""
    return await _set_enabled(webhook_id, enabled=False, as_json=as_json)


@webhooks_app.command("rotate")
@async_command
async def rotate_webhook(
    webhook_id: WebhookId,
    overlap: Annotated[int, typer.Option(help="Seconds for which both secrets sign.", min=0, max=604_800)] = 86_400,
    as_json: AsJson = False,
) -> int:
    """Create a new secret for a webhook and print it; it is shown only once."""
    async with open_client(command_settings()) as client:
        return _print_new(await client.admin.rotate_webhook(webhook_id, overlap_seconds=overlap), as_json=as_json)


@webhooks_app.command("test")
@async_command
async def test_webhook(webhook_id: WebhookId, as_json: AsJson = False) -> int:
    """Deliver a test event now, and print the receiver's response."""
    async with open_client(command_settings()) as client:
        result = await client.admin.test_webhook(webhook_id)
    if as_json:
        print_json(result)
    else:
        answer = f"The receiver answered {result.status}" if result.delivered else result.error
        output().print(Text(f"{answer} ({result.duration_ms} ms)"))
    return EXIT_DONE if result.delivered else EXIT_FAILED


@webhooks_app.command("deliveries")
@async_command
async def list_deliveries(
    webhook_id: WebhookId,
    state: Annotated[str | None, typer.Option(help="pending, delivered, or dead (the dead letters).")] = None,
    limit: Annotated[int, typer.Option(help="At most this many.", min=1, max=200)] = 50,
    as_json: AsJson = False,
) -> int:
    """List deliveries, the newest first."""
    async with open_client(command_settings()) as client:
        page = await client.admin.webhook_deliveries(webhook_id, state=cast("DeliveryState | None", state), limit=limit)
    if as_json:
        print_json(page)
        return EXIT_DONE
    table = Table(box=None)
    for column in ("Event", "Type", "State", "Attempts", "Last answer"):
        table.add_column(column, no_wrap=column in ("Event", "State"), overflow="fold")
    for each in page.deliveries:
        answer = each.last_error or (str(each.last_status) if each.last_status else "")
        table.add_row(each.event_id, each.event_type, each.state, str(each.attempts), Text(answer))
    output().print(table)
    return EXIT_DONE


@webhooks_app.command("replay")
@async_command
async def replay_webhook(
    webhook_id: WebhookId,
    event: Annotated[list[str] | None, typer.Option(help="Only these events; by default every dead letter.")] = None,
    after: Annotated[int | None, typer.Option(help="The events after this position of the log.", min=0)] = None,
    as_json: AsJson = False,
) -> int:
    """Deliver events again, under the same ids."""
    async with open_client(command_settings()) as client:
        result = await client.admin.replay_webhook(webhook_id, event_ids=event or (), after=after)
    if as_json:
        print_json(result)
    else:
        output().print(Text(f"{result.queued} deliveries are queued."))
    return EXIT_DONE


@webhooks_app.command("delete")
@async_command
async def delete_webhook(webhook_id: WebhookId, as_json: AsJson = False) -> int:
    """Delete a webhook with its deliveries."""
    async with open_client(command_settings()) as client:
        await client.admin.delete_webhook(webhook_id)
    if as_json:
        print_json({"id": webhook_id, "state": "deleted"})
    else:
        output().print(Text(f"Webhook {webhook_id} is deleted."))
    return EXIT_DONE


async def _set_enabled(webhook_id: str, *, enabled: bool, as_json: bool) -> int:
    async with open_client(command_settings()) as client:
        present = await client.admin.webhook(webhook_id)
        changed = await client.admin.update_webhook(webhook_id, _request_of(present, enabled=enabled))
    if as_json:
        print_json(changed)
    else:
        output().print(Text(f"Webhook {webhook_id} is {changed.state}."))
    return EXIT_DONE


def _request_of(view: WebhookView, *, enabled: bool) -> WebhookRequest:
    """Return the request that leaves a webhook as it is, but for its state."""
    return WebhookRequest(view.url, view.patterns, view.subjects, view.data, view.format, view.description, enabled)


def _print_new(new: NewWebhook, *, as_json: bool) -> int:
    if as_json:
        print_json(new)
        return EXIT_DONE
    # Standard output has the secret alone, so that a script can capture it.
    messages().print(Text(f"Webhook {new.webhook.id} for {new.webhook.url}. The secret is shown this once:"))
    print(new.secret, flush=True)
    return EXIT_DONE
