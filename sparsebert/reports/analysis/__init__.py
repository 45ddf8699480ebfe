"""What the papers study of their subnetworks: each analysis in a file of its own, made from finished runs."""

from __future__ import annotations

from sparsebert.reports.analysis.base import Analysis, Finding, Options
from sparsebert.reports.analysis.curves import CURVES
from sparsebert.reports.analysis.flatness import FLATNESS
from sparsebert.reports.analysis.layers import LAYERS
from sparsebert.reports.analysis.perturbed import REINIT, SHUFFLE
from sparsebert.reports.analysis.pretraining import PRETRAINING
from sparsebert.reports.analysis.recovery import RECOVERY
from sparsebert.reports.analysis.scarcity import SCARCITY
from sparsebert.reports.analysis.similarity import SIMILARITY
from sparsebert.reports.analysis.sparsity import SPARSITY

__all__ = ["ANALYSES", "Analysis", "Finding", "Options"]

ANALYSES: dict[str, Analysis] = {
    "sparsity": SPARSITY,
    "similarity": SIMILARITY,
    "recovery": RECOVERY,
    "pretraining": PRETRAINING,
    "curves": CURVES,
    "scarcity": SCARCITY,
    "layers": LAYERS,
    "flatness": FLATNESS,
    "shuffle": SHUFFLE,
    "reinit": REINIT,
}
"""By the name that `--what` takes, in the order they are made."""
