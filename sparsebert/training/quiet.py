"""Silences what libraries say on every start and a user can do nothing about."""

from __future__ import annotations

import os
import warnings

__all__ = ["quiet"]


def quiet() -> None:
    """Sets transformers and datasets to errors only, without progress bars; real warnings of torch stay."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    import datasets
    import huggingface_hub
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    # Each of its tries to reach the hub; the error in the end says it once.
    huggingface_hub.logging.set_verbosity_error()
    # Raised by torch's scheduler on its first step under accelerate's wrapper, which does call them in order.
    warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step\\(\\)`")
    # Accelerate's own call of torch; what it passes is what the run wants.
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
