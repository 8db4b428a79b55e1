"""The executor service: runs the programs and SQL queries of requests and tasks in this machine's sandbox.

Requests to external servers go through the egress guard, to hosts on the tenant's allow-list.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence

from octollm import Arm, Artifact, Check, Context, Evidence, ExecuteResult, FileRef, OctoError, Task
from octollm.arm import build_arm
from octollm.config import Settings
from octollm.contracts.operations import (
    ExternalRequest,
    ExternalResponse,
    ResultSet,
    RunRequest,
    RunResult,
    format_assumptions,
    format_cell,
    parse_result_set,
)
from octollm.contracts.service_operations import calls_of
from octollm.rpc.egress import EgressClient, EgressPolicy
from octollm.rpc.service import Service, ServiceBase
from octollm.rpc.tls import external_context_factory
from octollm.services.arms.adapters import read_file_text
from octollm.services.arms.executor.external import ExternalCaller, HostAllowlist
from octollm.services.arms.executor.sandbox import Sandbox
from octollm.services.arms.executor.selection import RunnerProvider, select_sandbox
from octollm.telemetry import Metrics, Tracer

MAIN_PROGRAM = "main.py"
MAX_SHOWN_ROWS = 50
MAX_REASON = 400


def build_run_request(files: Sequence[FileRef], query: str | None) -> RunRequest:
    """Return the run for a task's files: ``query`` (the text of its SQL file), ``main.py``, or the only program.

    Raises ``file_invalid`` when it is ambiguous what to run.
    """
    if query is not None:
        tables = tuple(file for file in files if not file.name.endswith(".sql"))
        return RunRequest("sql", (query.strip(),), tables)
    programs = [file.name for file in files if file.name.endswith(".py")]
    name = MAIN_PROGRAM if MAIN_PROGRAM in programs else programs[0] if len(programs) == 1 else None
    if name is None:
        raise OctoError(
            f"The executor runs {MAIN_PROGRAM}, or the only .py or .sql file of a task; it was given "
            f"{', '.join(file.name for file in files)[:200] or 'no file'}.",
            code="file_invalid",
        )
    return RunRequest("python", (name,), tuple(files))


def find_sql_file(files: Sequence[FileRef]) -> FileRef | None:
    """Return the SQL file to run: the only one, where there is no program."""
    queries = [file for file in files if file.name.endswith(".sql")]
    return queries[0] if len(queries) == 1 and not any(file.name.endswith(".py") for file in files) else None


def summarise_run(request: RunRequest, result: RunResult) -> tuple[str, Evidence]:
    """Return the output of a successful run and its evidence. Raises ``not_accepted`` for a failed one."""
    if result.reason or result.exit_code != 0:
        raise OctoError(f"The run failed: {_failure_reason(result)}", code="not_accepted")
    check = Check("run", True, f"succeeded in {result.duration_ms} ms in {result.sandbox}")
    if request.language == "sql":
        table = parse_result_set(result.stdout)
        query = request.command[0]
        return _format_table(table, query), Evidence(
            kind="data",
            query=query,
            columns=table.columns,
            rows=table.row_count,
            assumptions=table.assumptions,
            checks=(check,),
        )
    return result.stdout.strip() or "The program succeeded and printed nothing.", Evidence(kind="text", checks=(check,))


def _failure_reason(result: RunResult) -> str:
    if result.reason:
        return f"it was stopped by a limit ({result.reason})."
    return result.stderr.strip()[-MAX_REASON:] or f"it ended with {result.exit_code}."


def _format_table(table: ResultSet, query: str) -> str:
    if len(table.rows) == 1:
        pairs = zip(table.columns, table.rows[0], strict=True)
        body = "\n".join(f"{name}: {format_cell(cell)}" for name, cell in pairs)
    else:
        rows = [" | ".join(format_cell(cell) for cell in row) for row in table.rows[:MAX_SHOWN_ROWS]]
        body = "\n".join((" | ".join(table.columns), " | ".join("---" for _ in table.columns), *rows))
    parts = (body, format_assumptions(table.assumptions), f"Query:\n```sql\n{query}\n```")
    return "\n\n".join(filter(None, parts))


MAX_FILES = 64
"""Files of one run."""


def executor_arm(runner_provider: RunnerProvider, external: ExternalCaller, metrics: Metrics, tracer: Tracer) -> Arm:
    """Return the executor over its sandbox and its client for external servers."""
    arm = Arm.built_in(
        "executor",
        "Runs Python programs and SQL queries in a sandbox.",
        calls=calls_of("executor"),
        accepts=("files:text", "files:tabular"),
    )

    @arm.operation
    async def run(request: RunRequest, ctx: Context) -> RunResult:
        """Run a program or a query."""
        return await run_in_sandbox(request, ctx, runner_provider, metrics, tracer)

    @arm.operation
    async def execute(task: Task, ctx: Context) -> ExecuteResult:
        """Run the program or the query among a task's files."""
        files = task.context.files
        query = find_sql_file(files)
        request = build_run_request(files, None if query is None else await read_file_text(ctx, query))
        result = await run_in_sandbox(request, ctx, runner_provider, metrics, tracer)
        output, evidence = summarise_run(request, result)
        await ctx.emit(output)
        return ExecuteResult(output=output, artifacts=await _store_artifacts(result, ctx), evidence=evidence)

    @arm.operation(
        kind="at_most_once",
        example=ExternalRequest("GET", "https://example.org/"),
        codes=["host_not_allowed", "url_refused"],
    )
    async def http(request: ExternalRequest, ctx: Context) -> ExternalResponse:
        """Send a request to an external server on the tenant's allow-list."""
        return await external.send(ctx.info.tenant, request, ctx.effect_key("http", request), ctx.deadline)

    del run, execute, http
    return arm


async def run_in_sandbox(
    request: RunRequest, ctx: Context, runner_provider: RunnerProvider, metrics: Metrics, tracer: Tracer
) -> RunResult:
    """Fetch the files of a run and run it. Raises ``no_sandbox``, what reading a file and what the runner raise."""
    if len(request.files) > MAX_FILES:
        raise OctoError(f"A run takes at most {MAX_FILES} files.", code="file_invalid")
    names = [file.name for file in request.files]
    if len(set(names)) != len(names):
        raise OctoError("Two files of a run have the same name.", code="file_invalid")
    # Before the files are fetched, which would be wasted without a sandbox.
    runner = await runner_provider.get()
    files = {file.name: await ctx.artifacts.read(file) for file in request.files}
    outcome = "failed"
    try:
        with tracer.span(f"sandbox {request.language}") as span:
            result = await runner.run(request, files)
            span.attributes |= {
                "octollm.sandbox": result.sandbox,
                "process.exit.code": result.exit_code,
                "octollm.limit": result.reason,
            }
        outcome = result.reason or ("ok" if result.exit_code == 0 else "error")
        return result
    finally:
        metrics.sandbox_runs.labels(request.language, outcome).inc()


async def _store_artifacts(result: RunResult, ctx: Context) -> tuple[Artifact, ...]:
    """Store the files that a program wrote, if the token of the call allows it."""
    if not ctx.allows("files:write"):
        return ()
    return tuple([await ctx.artifacts.write(file.name, (file.text or "").encode()) for file in result.files])


@contextlib.asynccontextmanager
async def executor_service(
    base: ServiceBase, settings: Settings, *, select: Callable[[], Awaitable[Sandbox]] | None = None
) -> AsyncGenerator[Service]:
    """Yield the executor service; its sandbox is selected in the background.

    Without a sandbox the service still starts, and explains in ``/ready`` and in each answer how to install one; it
    never runs a program without one. ``select`` overrides the settings.
    """

    async def by_settings() -> Sandbox:
        tools = settings.model_cache.parent / "tools"
        return await select_sandbox(
            settings.sandbox,
            cache_dir=tools,
            clock=base.clock,
            on_refused=lambda why: base.log.warning("sandbox.refused", reason=why),
        )

    provider = RunnerProvider(
        select or by_settings,
        clock=base.clock,
        log=base.log,
        on_queued=base.metrics.queue_observer("sandbox"),
    )
    policy = EgressPolicy.of(settings.egress_origins, settings.egress_ports)
    tls = external_context_factory(settings.tls_ca)
    async with EgressClient(policy, tls=tls) as http:
        external = ExternalCaller(HostAllowlist(settings.http_allowlist), policy, http)
        provider.start()
        try:
            arm = executor_arm(provider, external, base.metrics, base.tracer)
            yield build_arm(arm, base, readiness_checks={"sandbox": provider.checkup})
        finally:
            await provider.aclose()
