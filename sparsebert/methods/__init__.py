"""The methods, by the name that `--method` takes."""

from sparsebert.methods.adapt_prune import AdaptPrune
from sparsebert.methods.base import Context, Method, Phase, TrainingModule
from sparsebert.methods.feature_extraction import FeatureExtraction
from sparsebert.methods.finetune import FineTune
from sparsebert.methods.gmp import GradualMagnitude
from sparsebert.methods.imp import IterativeMagnitude
from sparsebert.methods.kd import Distil
from sparsebert.methods.magnitude import Magnitude
from sparsebert.methods.movement import Movement
from sparsebert.methods.random import RandomMask
from sparsebert.methods.smp import StaticPruning
from sparsebert.methods.soft_movement import SoftMovement

__all__ = ["METHODS", "Context", "Method", "Phase", "TrainingModule"]

METHODS: dict[str, type[Method]] = {
    "adapt_prune": AdaptPrune,
    "feature_extraction": FeatureExtraction,
    "finetune": FineTune,
    "gmp": GradualMagnitude,
    "imp": IterativeMagnitude,
    "kd": Distil,
    "magnitude": Magnitude,
    "movement": Movement,
    "random": RandomMask,
    "smp": StaticPruning,
    "soft_movement": SoftMovement,
}
