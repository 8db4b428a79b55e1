"""OctoLLM: a team of LLM agents as secure, observable services.

Importing this package does nothing. Its submodules are the layers; what is
named here is the public API.
"""

__all__ = ["__version__"]

__version__ = "0.1.0"
