"""The settings of a run that do not depend on its method."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["RunSettings"]


def _arg(default: Any, help: str, **more: Any) -> Any:
    return field(default=default, metadata={"help": help, **more})


@dataclass
class RunSettings:
    """What is trained, on what, and where it goes."""

    method: str = _arg("adapt_prune", "how the subnetwork is found; see the list above")
    model: str = _arg(
        "demo",
        "a folder or hub id of a BERT, RoBERTa or DistilBERT; 'demo' is the MiniLM of the extra sparsebert[demo]",
    )
    task: str = _arg(
        "demo", "cola, sst2, mrpc, stsb, qqp, mnli, qnli, rte, wnli, squad, squad_v2, demo, demo_imdb, custom"
    )
    data_dir: str | None = _arg(None, "folder or file with local parquet, csv, tsv or jsonl; without it, the hub")
    text_columns: list[str] = field(
        default_factory=list, metadata={"help": "columns of one text, or of a pair, of your own data"}
    )
    label_column: str | None = _arg(None, "column of the label of your own data")
    max_train_samples: int | None = _arg(None, "train on at most this many examples")
    max_eval_samples: int | None = _arg(None, "evaluate on at most this many examples")
    imbalance: float | None = _arg(
        None, "drop training rows until the most frequent class has this many times the rows of the rarest one"
    )
    few_samples: int | None = _arg(None, "then train on exactly this many of them, drawn at random")
    label_noise: float = _arg(0.0, "then flip each training label to another class with this probability")
    variant_seed: int = _arg(0, "of --imbalance, --few-samples and --label-noise; the same data whatever --seed is")
    max_length: int | None = _arg(None, "longest input in tokens [64 for the demo, 384 for SQuAD, else 128]")
    pattern: str = _arg("unstructured", "unstructured, 2:4 (any n:m), block:RxC, neurons, heads")
    sparsity: float | None = _arg(None, "share of the masked weights to prune, in [0, 1) [0.5, or what n:m says]")
    allocation: str = _arg(
        "global", "rank scores over all matrices, or in each matrix alone", choices=["global", "matrix"]
    )
    masked: list[str] = field(
        default_factory=lambda: ["encoder"],
        metadata={
            "help": "what may be pruned: encoder, pooler, word_embeddings, position_embeddings, "
            "token_type_embeddings, embeddings"
        },
    )
    head: str | None = _arg(
        None, "mlp: scalar mix of all layers and a 768-unit MLP; linear: one linear [the method's own]"
    )
    pooling: str = _arg("cls", "what the head sees of a sequence: cls or mean", choices=["cls", "mean"])
    precision: str = _arg("auto", "auto: bf16 where the hardware has it", choices=["auto", "fp32", "bf16", "fp16"])
    teacher: str | None = _arg(
        None, "folder of a finished dense run to distil; without it, one is trained once and kept by its configuration"
    )
    teacher_model: str | None = _arg(None, "what the teacher is fine-tuned from [--model]")
    teacher_learning_rate: float = _arg(5e-5, "of the teacher's fine-tuning")
    teacher_epochs: float = _arg(3.0, "of the teacher's fine-tuning")
    teacher_max_steps: int = _arg(-1, "steps of the teacher's fine-tuning; wins over --teacher-epochs")
    teacher_seed: int = _arg(42, "of the teacher: runs that differ in --seed share one")
    text: list[str] = field(
        default_factory=list,
        metadata={
            "help": "files or folders of plain text to pre-train on, for methods that do: txt, parquet, jsonl, csv"
        },
    )
    text_length: int | None = _arg(None, "tokens of a block of text [512, or what the model takes]")
    watch_train: bool = _arg(
        False, "where a slice held out of train is watched, also score as many rows of what is trained on"
    )
    untouched: bool = _arg(True, "also train the head on the untouched model and report it (feature extraction)")
    output: str | None = _arg(None, "folder of the run [runs/TASK-METHOD-N]")
    resume: str | None = _arg(None, "folder of an interrupted run to go on with; takes its own settings")
    config: str | None = _arg(None, "a run's config.yaml; flags given beside it win")
