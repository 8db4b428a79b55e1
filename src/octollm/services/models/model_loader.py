"""The installation's chat model: chosen by the settings, loaded once in the background, awaited by the first call."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from octollm.clock import Clock
from octollm.errors import OctoError
from octollm.llm.selection import ModelChoice
from octollm.llm.types import ChatModel
from octollm.rpc.health import DependencyStatus
from octollm.telemetry import Logger

RETRY_SECONDS = 10.0
"""How long a failed load is believed before a call tries again; a missing model is looked for at every call."""


class ModelLoader:
    """Chooses and opens the model. ``choose`` says which one; it raises ``no_model`` while there is none."""

    def __init__(self, choose: Callable[[], ModelChoice], *, clock: Clock, log: Logger) -> None:
        self._choose = choose
        self._clock = clock
        self._log = log
        self._choice: ModelChoice | None = None
        self._loading: asyncio.Future[ChatModel] | None = None
        self._failure: OctoError | None = None
        self._failed_at = 0.0
        self._closed = False

    @property
    def is_local(self) -> bool:
        """Say whether the model runs on this machine, so that closing its stream stops it at once."""
        return self._choice is not None and self._choice.entry is not None

    def start_loading(self) -> None:
        """Choose the model and start to load it. Raises ``setting_invalid``; a missing model is no error yet."""
        try:
            self._ensure_loading()
        except OctoError as error:
            if error.code != "no_model":
                raise
            self._log.warning("model.missing", error=error)

    def list_names(self) -> tuple[str, ...]:
        """Return what a request may call the model: none while there is none."""
        try:
            return ("default", self._get_choice().name)
        except OctoError:
            return ()

    async def get(self, name: str) -> ChatModel:
        """Return the model once it is loaded.

        Raises ``no_model`` with how to get one, ``not_found`` when ``name`` is another, and what its loading raised.
        """
        chosen = self._get_choice()
        if name not in ("default", chosen.name):
            raise OctoError(f"There is no model {name[:80]!r} here; use `default` or {chosen.name}.", code="not_found")
        failure = self._failure
        if failure is not None and self._clock.monotonic() - self._failed_at < RETRY_SECONDS:
            raise OctoError(failure.detail, code=failure.code, retry_after=failure.retry_after) from failure
        loading = self._ensure_loading()
        try:
            # Whoever leaves early must not stop the load that others wait for.
            return await asyncio.shield(loading)
        except asyncio.CancelledError:
            if loading.cancelled():  # the service closed, which is not the caller's own cancellation
                raise _shutting_down() from None
            raise

    async def checkup(self) -> DependencyStatus:
        """Say for ``/ready`` whether there is a model. The service is of use without one: it says how to get one."""
        try:
            chosen = self._get_choice()
        except OctoError as error:
            return DependencyStatus(ok=False, detail=error.detail, required=False)
        if self._failure is not None:
            return DependencyStatus(ok=False, detail=self._failure.detail, required=False)
        loaded = self._loading is not None and self._loading.done()
        return DependencyStatus(ok=True, detail=chosen.name if loaded else f"{chosen.name} is loading", required=False)

    async def aclose(self) -> None:
        """Stop loading, or free the model."""
        self._closed = True
        loading, self._loading = self._loading, None
        if loading is None:
            return
        loading.cancel()
        await asyncio.wait({loading})
        if not loading.cancelled() and loading.exception() is None:
            await loading.result().aclose()

    def _get_choice(self) -> ModelChoice:
        if self._choice is None:
            self._choice = self._choose()
        return self._choice

    def _ensure_loading(self) -> asyncio.Future[ChatModel]:
        chosen = self._get_choice()
        if self._closed:
            raise _shutting_down()
        if self._loading is None:
            self._failure = None
            self._loading = asyncio.ensure_future(chosen.open())
            self._loading.add_done_callback(self._record_outcome)
        return self._loading

    def _record_outcome(self, loading: asyncio.Future[ChatModel]) -> None:
        error = None if loading.cancelled() else loading.exception()
        if error is None:
            return
        self._loading, self._choice = None, None  # the next call chooses again: the file may have come or gone
        self._failed_at = self._clock.monotonic()
        self._failure = (
            error if isinstance(error, OctoError) else OctoError("The model did not load.", code="model_failed")
        )
        self._log.error("model.load_failed", error=error)


def _shutting_down() -> OctoError:
    return OctoError("The service is shutting down.", code="draining", retry_after=1)
