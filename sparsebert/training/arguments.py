"""The command line of a run: its own flags, the method's, and Hugging Face Trainer's under their own names."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

import yaml
from transformers import HfArgumentParser, TrainingArguments

from sparsebert.errors import UserError, unknown
from sparsebert.methods import METHODS
from sparsebert.methods.base import Method, describe
from sparsebert.training.config import Config, typed
from sparsebert.training.settings import RunSettings
from sparsebert.training.trainer import OWNED, REFUSED

__all__ = ["parse_arguments"]

_TRAINER_HELP = {
    "max_steps": "optimiser steps of a phase; wins over --num-train-epochs",
    "num_train_epochs": "epochs of a phase",
    "learning_rate": "of the head (of all weights, for methods that train them)",
    "per_device_train_batch_size": "examples of a step on each device",
    "per_device_eval_batch_size": "examples of an evaluation batch",
    "gradient_accumulation_steps": "micro-batches of a step",
    "lr_scheduler_type": "linear, cosine, constant, ...",
    "warmup_steps": "steps, or a share below 1",
    "seed": "of everything random",
    "save_steps": "steps between checkpoints",
    "eval_strategy": "no, steps or epoch: watch a slice held out of train",
    "eval_steps": "steps between evaluations",
    "logging_steps": "steps between log lines",
    "report_to": "tensorboard, wandb, ...",
}


class _Help(argparse.RawDescriptionHelpFormatter):
    """One spelling of each flag; both `--max-steps` and `--max_steps` are taken."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        options = ", ".join(option for option in action.option_strings if "_" not in option)
        few = action.choices is not None and len(list(action.choices)) < 5
        words = "{" + ",".join(map(str, action.choices or ())) + "}" if few else action.dest.rpartition("_")[2].upper()
        return options if action.nargs in (0, "?") else f"{options} {words}"


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def parse_arguments(argv: Sequence[str]) -> tuple[Config, Path | None, bool]:
    """Reads the command line, and the configuration file it names.

    Later beats earlier: Trainer's defaults, the method's, `--config`, flags.

    Returns:
        The configuration, the output folder if one was given, and whether to resume.

    Raises:
        UserError: unknown flags, methods or values; files that cannot be read.
    """
    first = _parser([RunSettings])
    for action in first._actions:
        action.type = None  # here only the words matter
        action.choices = None
    early, _ = first.parse_known_args([word for word in argv if word not in ("-h", "--help")])
    stored = _stored(early)
    run_values = {**stored.get("run", {}), **{k: v for k, v in vars(early).items() if k == "method"}}
    name = run_values.get("method", RunSettings.method)
    if not isinstance(name, str) or name not in METHODS:
        raise unknown("method", str(name), METHODS)
    method = METHODS[name]
    parser = _parser([RunSettings, _with_help(method.Settings), TrainingArguments])
    given, strange = parser.parse_known_args(argv)
    if strange:
        raise _strange(strange[0], method, parser)
    flags = vars(given)
    if "resume" in flags and len(flags) > 1:
        extra = sorted(set(flags) - {"resume"})[0].replace("_", "-")
        raise UserError(
            f"--resume takes the interrupted run's own settings and folder; leave out --{extra} "
            "(or start a new run with --config and other flags)"
        )
    if not method.sparsifies:
        for key in ("pattern", "sparsity", "allocation", "masked"):
            if key in flags:
                raise UserError(f"--{key}: method {name} prunes nothing; leave it out, or choose another --method")
    config = _resolve(method, stored, flags)
    where = flags.get("resume") or flags.get("output")
    return config, Path(where).expanduser() if where else None, "resume" in flags


def _parser(types: list[Any]) -> _Parser:
    lines = "\n".join(f"  {name:20} {method.summary}" for name, method in METHODS.items())
    parser = _Parser(
        types,
        prog="python -m sparsebert.train",
        usage="python -m sparsebert.train [--method METHOD] [--task TASK] [--model MODEL] [--sparsity S] ...",
        description="Find a subnetwork of a pre-trained BERT, save it and score it.\n\nmethods:\n" + lines,
        epilog="Every other flag of Hugging Face's TrainingArguments is taken too, under its own name.",
        formatter_class=lambda prog: _Help(prog, max_help_position=34, width=110),
        allow_abbrev=False,
    )
    own = {field.name for cls in types if cls is not TrainingArguments for field in dataclasses.fields(cls)}
    for action in parser._actions:
        if action.dest == "help":
            continue
        if action.dest not in own:
            action.help = _TRAINER_HELP.get(action.dest, argparse.SUPPRESS)
        elif action.help and "[" not in action.help and action.default not in (None, [], argparse.SUPPRESS):
            shown = " ".join(action.default) if isinstance(action.default, list) else str(action.default)
            action.help += f" [{shown}]".replace("%", "%%")
        if any(option.startswith("--no_") for option in action.option_strings) and action.dest in own:
            action.help = "the opposite"
        elif action.option_strings[0].startswith("--no"):
            action.help = argparse.SUPPRESS
        action.default = argparse.SUPPRESS
        action.required = False
    return parser


def _with_help(settings: type) -> type:
    """The settings class with each field's docstring as its flag's help."""
    notes, hints = describe(settings), get_type_hints(settings)
    fields = [
        (
            field.name,
            hints[field.name],
            dataclasses.field(
                default=field.default,
                metadata={"help": f"{_plain(notes[field.name])} [{field.default}]".replace("%", "%%")},
            ),
        )
        for field in dataclasses.fields(settings)
    ]
    made = dataclasses.make_dataclass(settings.__name__, fields, namespace={"_argument_group_name": "the method's own"})
    made.__module__ = settings.__module__
    return made


def _plain(note: str) -> str:
    """A docstring as help: in lower case, no full stop, and round brackets so that [...] is the default alone."""
    note = note.rstrip(".").replace("[", "(").replace("]", ")")
    return note[:1].lower() + note[1:]


def _strange(word: str, method: type[Method], parser: argparse.ArgumentParser) -> UserError:
    flag = word.split("=")[0].replace("_", "-")
    owners = [name for name, other in METHODS.items() if flag in _flags(other.Settings)]
    if owners:
        return UserError(f"{flag}: is a setting of {', '.join(owners)}, and method {method.name} has none of that name")
    known = [option for action in parser._actions for option in action.option_strings if "_" not in option]
    near = difflib.get_close_matches(flag, known, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]}?" if near else ""
    return UserError(f"unknown argument {word!r}{hint} (--help lists them)")


def _flags(settings: type) -> set[str]:
    names = {field.name.replace("_", "-") for field in dataclasses.fields(settings)}
    return {f"--{name}" for name in names} | {f"--no-{name}" for name in names}


def _stored(early: argparse.Namespace) -> dict[str, Any]:
    """The configuration that `--config` or `--resume` names, as plain data."""
    source: str | None = getattr(early, "config", None)
    if getattr(early, "resume", None):
        source = str(Path(early.resume).expanduser() / "config.yaml")
        if not Path(source).is_file():
            raise UserError(f"resume {early.resume}: holds no run (no config.yaml there)")
    if source is None:
        return {}
    try:
        stored = yaml.safe_load(Path(source).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"config {source}: cannot be read ({' '.join(str(error).split())})") from error
    sections = {"run", "settings", "trainer"}
    if not isinstance(stored, dict) or not stored or set(stored) - sections:
        raise UserError(f"config {source}: expected the sections run, settings and trainer, as a run's config.yaml has")
    for section, values in stored.items():
        if not isinstance(values, dict | None) or not all(isinstance(key, str) for key in values or ()):
            raise UserError(f"config {source}: section {section}: expected lines 'name: value', got {values!r}")
    return {section: values or {} for section, values in stored.items()}


def _resolve(method: type[Method], stored: dict[str, dict[str, Any]], flags: dict[str, Any]) -> Config:
    types = {"run": RunSettings, "settings": method.Settings, "trainer": TrainingArguments}
    names = {section: {field.name for field in dataclasses.fields(cls) if field.init} for section, cls in types.items()}
    names["run"] -= {"output", "resume", "config"}
    names["trainer"] -= {*OWNED, *REFUSED}
    sections: dict[str, dict[str, Any]] = {
        section: {key: value for key, value in method.defaults.items() if key in names[section]}
        for section in ("run", "settings", "trainer")
    }
    was = stored.get("run", {}).get("method", RunSettings.method)
    for section, values in stored.items():
        # A stored method other than the one asked for now: its own settings, and its defaults, say nothing here.
        if section == "settings" and was != method.name:
            continue
        for key, value in values.items():
            if key not in names[section]:
                raise _not_stored(section, key, names[section])
            if was == method.name or not _is_default(was, key, value):
                sections[section][key] = value
    for key, value in flags.items():
        if key in OWNED or key in REFUSED:
            raise UserError(f"--{key.replace('_', '-')}: {_refusal(key)}")
        for place, known in names.items():
            if key in known:
                sections[place][key] = value
    sections["run"]["method"] = method.name
    values = {section: typed(cls, sections[section]) for section, cls in types.items()}
    for key in ("data_dir", "model", "teacher", "teacher_model"):
        value = values["run"].get(key)
        if value and not (key.endswith("model") and value == RunSettings.model):
            values["run"][key] = _whole_path(value)
    values["run"]["text"] = [_whole_path(path) for path in values["run"].get("text", [])]
    if values["settings"].get("mask"):
        values["settings"]["mask"] = _whole_path(values["settings"]["mask"])
    return Config(RunSettings(**values["run"]), method.Settings(**values["settings"]), values["trainer"])


def _whole_path(path: str) -> str:
    """The run is read again from elsewhere: a path must not depend on where it was started."""
    return str(Path(path).expanduser().resolve()) if Path(path).expanduser().exists() else path


def _is_default(method: object, key: str, value: Any) -> bool:
    defaults = METHODS[method].defaults if isinstance(method, str) and method in METHODS else {}
    return key in defaults and defaults[key] == value


def _not_stored(section: str, key: str, known: set[str]) -> UserError:
    if section == "trainer" and (key in OWNED or key in REFUSED):
        return UserError(f"{key} in the configuration's section trainer: {_refusal(key)}")
    return unknown(f"setting in the configuration's section {section!r}", key, known)


def _refusal(key: str) -> str:
    if key in REFUSED:
        return f"not for a run: {REFUSED[key]}"
    return "is decided by the run itself" + (f"; {OWNED[key]}" if OWNED[key] else "")
