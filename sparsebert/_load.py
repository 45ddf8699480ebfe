"""Finding or building the compiled libraries, and loading them once."""

from __future__ import annotations

__all__ = ["missing"]


def missing(backend: str) -> str | None:
    """Why the compiled `backend` ("cpu" or "cuda") is not there, or None."""
    return "not built"
