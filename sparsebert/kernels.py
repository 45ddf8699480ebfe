"""Triton kernels, one module an op (`sparsebert.kernels.<op>`); their sources are the repository's folder `kernels/`.

A wheel carries them in a folder beside this file; in a checkout, installed editable or not installed at all, they are
beside the package. Neither folder has an `__init__.py`: from the repository's root that would make `import kernels`
find this project instead of Hugging Face's package of that name. So this module stands for the package, with their
path.
"""

from __future__ import annotations

from pathlib import Path

_package = Path(__file__).resolve().parent
# The sources of csrc/ tell a checkout from a site-packages folder, where `kernels` beside this package is another's.
_checkout = _package.parent if (_package.parent / "csrc" / "ops.cpp").is_file() else None

__path__ = [str((_checkout or _package) / "kernels")]
