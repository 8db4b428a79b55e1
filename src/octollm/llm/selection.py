"""Model selection: resolves the settings OCTOLLM_MODEL and OCTOLLM_EMBEDDING_MODEL to models."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from octollm.errors import OctoError, SettingError
from octollm.llm.cache import ModelCache
from octollm.llm.catalogue import MODEL_CATALOGUE, ModelEntry, find_entry
from octollm.llm.embedded import EmbeddedModel, EmbeddedSettings
from octollm.llm.embeddings import EmbeddedEmbeddingModel, EmbeddingModel
from octollm.llm.openai_compatible import OPENAI_URL, OpenAICompatibleModel
from octollm.llm.types import ChatModel


@dataclass(frozen=True, slots=True)
class ModelChoice:
    """A resolved model. ``open`` loads it; the caller closes it. ``entry`` is ``None`` for a provider's model."""

    name: str
    entry: ModelEntry | None
    open: Callable[[], Awaitable[ChatModel]]


def resolve_model(
    setting: str,
    url: str | None,
    api_key: str | None,
    cache: ModelCache,
    *,
    embedded: EmbeddedSettings | None = None,
    catalogue: tuple[ModelEntry, ...] = MODEL_CATALOGUE,
) -> ModelChoice:
    """Resolve ``setting``: ``embedded`` (the largest model in ``cache``), ``embedded:NAME`` or ``openai:NAME``.

    Raises ``no_model`` when the model is not in the cache, and ``setting_invalid`` for any other value. Opening the
    choice verifies the file's digest (``model_damaged``) and loads it.
    """
    kind, _, name = setting.partition(":")
    if kind == "openai" and name:
        model = OpenAICompatibleModel(name, base_url=url or OPENAI_URL, api_key=api_key)
        return ModelChoice(model.name, None, lambda: _open_provider(model))
    if kind != "embedded" or (":" in setting and not name):
        raise SettingError(
            f"OCTOLLM_MODEL is {setting!r}; it should be `embedded`, `embedded:{catalogue[0].name}` or `openai:NAME`."
        )
    entry = find_entry(name, catalogue) if name else cache.largest(catalogue)
    if entry is None or not cache.has(entry):
        missing = catalogue[0] if entry is None else entry
        raise OctoError(
            f"There is no model on this machine yet. Either run `octollm models pull {missing.name}` "
            f"({missing.size / 1e6:,.0f} MB), or use a provider: OCTOLLM_MODEL=openai:NAME with OCTOLLM_MODEL_URL.",
            code="no_model",
        )
    return ModelChoice(entry.name, entry, lambda: _open_embedded(entry, cache, embedded))


def resolve_embedding_model(setting: str, url: str | None, api_key: str | None) -> EmbeddingModel | None:
    """Resolve ``setting``: ``embedded``, ``openai:NAME``, or ``off``, which is ``None``.

    Raises ``setting_invalid`` for any other value, and for a wrong URL or key.
    """
    kind, _, name = setting.partition(":")
    if kind == "openai" and name:
        return OpenAICompatibleModel(name, base_url=url or OPENAI_URL, api_key=api_key)
    if setting == "embedded":
        return EmbeddedEmbeddingModel()
    if setting == "off":
        return None
    raise SettingError(f"OCTOLLM_EMBEDDING_MODEL is {setting!r}; it should be `embedded`, `openai:NAME` or `off`.")


async def _open_provider(model: ChatModel) -> ChatModel:
    return model


async def _open_embedded(entry: ModelEntry, cache: ModelCache, settings: EmbeddedSettings | None) -> ChatModel:
    model = EmbeddedModel(entry, await cache.verify(entry), settings)
    try:
        await model.start()
    except BaseException:
        await model.aclose()
        raise
    return model
