"""sparsebert: find, run and prove sparse subnetworks of BERT-style encoders.

Importing the package loads nothing heavy; what it offers is looked up on first use.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# Public name -> module that defines it; resolved on first access (PEP 562).
_PUBLIC: dict[str, str] = {
    "AutoSparseModel": "sparsebert.models.sparse_load",
    "BlockLists": "sparsebert.ops",
    "BlockSparseAttention": "sparsebert.nn",
    "MaskPack": "sparsebert.models.mask_pack",
    "MaskedEmbedding": "sparsebert.nn",
    "MaskedLinear": "sparsebert.nn",
    "Masks": "sparsebert.nn",
    "Matrix": "sparsebert.patterns",
    "SparseLinear": "sparsebert.nn",
    "load_sparsified": "sparsebert.nn",
    "parse_pattern": "sparsebert.patterns",
    "register_attention": "sparsebert.nn",
    "remove_structure": "sparsebert.models.per_layer",
    "save_sparse": "sparsebert.models.sparse_folder",
    "sparsify": "sparsebert.nn",
    "use_attention": "sparsebert.nn",
}

__all__ = ["__version__", *sorted(_PUBLIC)]


def __getattr__(name: str) -> Any:
    module = _PUBLIC.get(name)
    if module is None:
        raise AttributeError(f"module 'sparsebert' has no attribute {name!r}")
    value = getattr(importlib.import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
