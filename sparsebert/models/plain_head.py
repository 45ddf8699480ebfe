"""A task model as the class of transformers that computes the same, where there is one."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch

from sparsebert.models.prunable import LAYOUTS
from sparsebert.models.task_model import TaskModel

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

__all__ = ["labelled_config", "with_plain_head"]

_PREFIXES = {"bert": "Bert", "roberta": "Roberta", "distilbert": "DistilBert"}


def with_plain_head(model: TaskModel) -> PreTrainedModel | None:
    """The transformers model that computes exactly what a task model does; None where there is none. Memory is shared.

    A linear head over BERT's pooler is `BertForSequenceClassification`; over RoBERTa's it is
    `RobertaForSequenceClassification`, whose head holds the pooler's linear; a linear head for spans is a
    `...ForQuestionAnswering` (which, unlike a task model, gives padding logits of its own).
    """
    import transformers

    base, kind = model.base, str(model.base.config.model_type)
    pooler: Any = getattr(base, "pooler", None)
    pooled = pooler is not None and kind in ("bert", "roberta") and model.pooling == "cls"
    if model.head_kind != "linear" or not (model.kind == "span" or pooled):
        return None
    task = "QuestionAnswering" if model.kind == "span" else "SequenceClassification"
    config = labelled_config(model)
    with torch.device("meta"):
        whole = getattr(transformers, f"{_PREFIXES[kind]}For{task}")(_even(config))
    whole.config = config
    encoder: Any = copy.copy(base)
    encoder._modules = dict(base._modules)
    output: Any = model.head.output
    if model.kind == "span":
        whole.qa_outputs = output
    elif kind == "bert":
        whole.classifier = output
    else:
        whole.classifier.dense, whole.classifier.out_proj = pooler.dense, output
    if (model.kind == "span" or kind == "roberta") and pooler is not None:
        encoder.pooler = None  # transformers builds these without one
    setattr(whole, whole.base_model_prefix, encoder)
    return whole.eval()


def labelled_config(model: TaskModel) -> PretrainedConfig:
    """The base's configuration with the task's labels."""
    config = copy.deepcopy(model.base.config)
    config.num_labels = model.num_labels
    if model.kind == "classification" and model.label_names:
        config.id2label = dict(enumerate(model.label_names))
        config.label2id = {name: index for index, name in enumerate(model.label_names)}
    if model.kind != "span":
        config.problem_type = "regression" if model.kind == "regression" else "single_label_classification"
    return config


def _even(config: PretrainedConfig) -> PretrainedConfig:
    """One for a model with nothing taken out, whose encoder is thrown away: transformers' BERT builds no other."""
    if not getattr(config, "is_heterogeneous", False):
        return config
    kind: Any = type(config)
    return kind(hidden_size=config.hidden_size, num_attention_heads=1, num_labels=config.num_labels)  # type: ignore[no-any-return]


if set(_PREFIXES) != set(LAYOUTS):
    raise RuntimeError("every kind of model needs the prefix of its classes in sparsebert/models/plain_head.py")
