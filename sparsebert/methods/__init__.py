"""The methods, by the name that `--method` takes."""

from sparsebert.methods.adapt_prune import AdaptPrune
from sparsebert.methods.base import Context, Method, Phase, TrainingModule
from sparsebert.methods.bert_emd import BertEmd
from sparsebert.methods.cr_ild import ConsistentLayers
from sparsebert.methods.feature_extraction import FeatureExtraction
from sparsebert.methods.finetune import FineTune
from sparsebert.methods.gmp import GradualMagnitude
from sparsebert.methods.imp import IterativeMagnitude
from sparsebert.methods.kd import Distil
from sparsebert.methods.magnitude import Magnitude
from sparsebert.methods.minilm import MiniLM
from sparsebert.methods.mix_kd import MixDistil
from sparsebert.methods.movement import Movement
from sparsebert.methods.pkd import PatientDistil
from sparsebert.methods.random import RandomMask
from sparsebert.methods.smp import StaticPruning
from sparsebert.methods.soft_movement import SoftMovement
from sparsebert.methods.spd import ProgressiveDistillation
from sparsebert.methods.tamt import Tamt
from sparsebert.methods.theseus import Theseus
from sparsebert.methods.tinybert import TinyBert

__all__ = ["METHODS", "Context", "Method", "Phase", "TrainingModule"]

METHODS: dict[str, type[Method]] = {
    "adapt_prune": AdaptPrune,
    "bert_emd": BertEmd,
    "cr_ild": ConsistentLayers,
    "feature_extraction": FeatureExtraction,
    "finetune": FineTune,
    "gmp": GradualMagnitude,
    "imp": IterativeMagnitude,
    "kd": Distil,
    "magnitude": Magnitude,
    "minilm": MiniLM,
    "mix_kd": MixDistil,
    "movement": Movement,
    "pkd": PatientDistil,
    "random": RandomMask,
    "smp": StaticPruning,
    "soft_movement": SoftMovement,
    "spd": ProgressiveDistillation,
    "tamt": Tamt,
    "theseus": Theseus,
    "tinybert": TinyBert,
}
