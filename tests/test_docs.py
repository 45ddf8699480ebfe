"""docs/: every snippet runs, every flag and link exists, tables say what the code does and what was measured."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from snippets import ROOT, Snippet, check_lines, commands, run_python, snippets

from sparsebert import _build, _load
from sparsebert.methods import METHODS
from sparsebert.ops._backend import OPS
from sparsebert.training.arguments import _flags, parse_arguments
from sparsebert.training.settings import RunSettings

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
RESULTS = ROOT / "benchmarks" / "results" / "amd-epyc-family-26-model-2-2-cores"
COMMANDS = ("evaluate", "benchmark", "analyze", "report", "export", "reproduce")
RIVALS = ("torch fp32", "oneDNN fp32", "oneDNN bf16", "OpenVINO fp32", "OpenVINO bf16")
STORED = ("unstructured fp32", "blocks:8x2 bf16")
SPARSITIES = (0.5, 0.7, 0.8, 0.9, 0.95)

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
Help = Callable[[str], str]


def read(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def table(text: str, first: str) -> list[list[str]]:
    """The cells of the rows of the first table in `text` whose head begins with the cell `first`."""
    lines = text[text.index(f"| {first} |") :].splitlines()
    body = lines[2 : next(i for i, line in enumerate([*lines, ""]) if not line.startswith("|"))]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in body]


@pytest.fixture
def help_of(capsys: pytest.CaptureFixture[str]) -> Help:
    """What a command's `--help` prints."""

    def text(module: str) -> str:
        with pytest.raises(SystemExit) as stop:
            importlib.import_module(module).main(["--help"])
        assert stop.value.code == 0
        return capsys.readouterr().out

    return text


def train_flags() -> set[str]:
    """Every flag of `python -m sparsebert.train`, whatever the method."""
    from transformers import TrainingArguments

    known = _flags(RunSettings) | _flags(TrainingArguments)
    for method in METHODS.values():
        known |= _flags(method.Settings)
    return known


# What is said of commands


@every_page
def test_every_shell_snippet_is_known(page: Path) -> None:
    check_lines(snippets(page))


@every_page
def test_every_command_could_be_run(page: Path, help_of: Help) -> None:
    for module, arguments in commands(snippets(page)):
        if module == "sparsebert.train":
            parse_arguments(arguments)
            continue
        text = help_of(module)
        for word in arguments:
            if word.startswith("--"):
                assert re.search(rf"{word}\b", text), f"{module}: no {word}"


@every_page
def test_every_flag_named_exists(page: Path, help_of: Help) -> None:
    known = train_flags() | {"--help", "--prune-at"}  # the latter is the toy method's
    for name in COMMANDS:
        known |= set(re.findall(r"--[a-z][\w-]*", help_of(f"sparsebert.{name}")))
    if page.name == "gpu.md":
        asked = [sys.executable, "-m", "benchmarks.gpu", "--help"]
        text = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        known |= set(re.findall(r"--[a-z][\w-]*", text)) | {"--no-deps", "--no-build-isolation", "--no-index"}
    for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", page.read_text(encoding="utf-8")):
        assert flag in known, flag


@every_page
def test_every_link_leads_somewhere(page: Path) -> None:
    prose = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    for target in re.findall(r"\]\(([^)]+)\)", prose):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.is_file(), target
        if anchor:
            heads = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), flags=re.M)
            assert anchor in [re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads], target


def test_the_readme_leads_to_every_page() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(f"(docs/{page.name})" in text for page in PAGES)


# docs/methods.md against the methods themselves


def rows(first: str) -> dict[str, list[str]]:
    found = {re.sub(r"[\[\]`]|\(.*\)", "", row[0]): row[1:] for row in table(read("methods.md"), first)}
    assert set(found) == set(METHODS)
    return found


def test_the_table_of_methods_says_what_they_do() -> None:
    for name, (_, masked, allocation, phases, _) in rows("method | paper").items():
        method = METHODS[name]
        if method.sparsifies:
            assert masked.split() == method.defaults.get("masked", ["encoder"]), name
            assert allocation == method.defaults.get("allocation", RunSettings.allocation), name
        else:
            assert (masked, allocation) == ("-", "-"), name
        untouched = method.sparsifies and method.defaults.get("untouched", True)
        built = [phase.name for phase in tiny.build(name, untouched=untouched).phases()]
        # Of rounds, whose number follows from the sparsity, the first stands for all.
        assert re.findall(r"`(\w+)`", phases) == [n for n in built if not re.fullmatch(r"round([2-9]|\d\d)", n)], name


def test_the_table_of_costs_says_who_needs_a_teacher_and_text() -> None:
    for name, (_, teacher, text, length) in rows("method | a step").items():
        method = METHODS[name]
        assert teacher.startswith("yes") == method.wants_teacher(method.Settings()), name
        assert (teacher == "with `--kd`") == (not teacher.startswith("yes") and "--kd" in _flags(method.Settings)), name
        phases = [phase for phase in tiny.build(name).phases()]
        assert text.startswith("yes") == any(phase.data == "text" for phase in phases), name
        assert ("--supplementary" in text) == ("--supplementary" in _flags(method.Settings)), name
        assert f"{method.defaults['num_train_epochs']:g}" in re.findall(r"\d+", length), name


def sections() -> dict[str, str]:
    parts = re.split(r"^### (\w+)$", read("methods.md"), flags=re.M)
    return dict(zip(parts[1::2], (re.split(r"^## ", part, flags=re.M)[0] for part in parts[2::2]), strict=True))


def test_every_method_has_a_section_with_its_own_command() -> None:
    assert set(sections()) == set(METHODS)
    for name, text in sections().items():
        found = commands([Snippet("", *block) for block in re.findall(r"```(bash)\n(.*?)```", text, flags=re.S)])
        assert found and all(arguments[:2] == ["--method", name] for _, arguments in found), name


@pytest.mark.parametrize("name", METHODS)
def test_the_settings_of_a_section_are_the_methods(name: str) -> None:
    from transformers import TrainingArguments

    known = _flags(METHODS[name].Settings) | _flags(RunSettings) | _flags(TrainingArguments)
    text = sections()[name]
    for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", text):
        assert flag in known, flag
    line = re.search(r"- Main settings: (.+)", text)
    assert line
    for flag, value in re.findall(r"`--([a-z][\w-]*)` \((\d[\d.e-]*)(?=[ ,:;)])", line[1]):
        field = flag.replace("-", "_")
        default = getattr(METHODS[name].Settings(), field, METHODS[name].defaults.get(field))
        # 0 stands for what another number follows from; the page then names that.
        assert default in (float(value), 0), f"{flag}: {default}"


# docs/formats.md against what was measured


def measured(name: str) -> list[dict[str, Any]]:
    return list(json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))["rows"])


def cells(stored: str, rows: int) -> list[dict[str, Any]]:
    return [cell for cell in measured("sparse_linear") if cell["kind"] == stored and cell["rows"] == rows]


def breaks_even(stored: str, rows: int, rival: str) -> str:
    """The least sparsity from which on every shape is faster."""
    wins = [
        all(cell[f"{rival} / sparse"] > 1 for cell in cells(stored, rows) if cell["sparsity"] == sparsity)
        for sparsity in SPARSITIES
    ]
    first = max((i + 1 for i, won in enumerate(wins) if not won), default=0)
    return f"{SPARSITIES[first]:.0%}".replace("%", " %")


def test_break_evens_are_those_measured() -> None:
    text = read("formats.md")
    found = table(text[text.index("<!-- break-even -->") :], "stored | rows")
    assert [row[:2] for row in found] == [[s, str(n)] for s in STORED for n in (1, 16, 128, 512, 4096)]
    for stored, rows, *shown in found:
        assert shown == [breaks_even(stored, int(rows), rival) for rival in RIVALS], (stored, rows)


def test_speeds_are_those_measured() -> None:
    text = read("formats.md")
    found = table(text[text.index("<!-- speed -->") :], "stored | rows")
    assert [row[:2] for row in found] == [[s, str(n)] for s in STORED for n in (1, 16, 128, 512, 4096)]
    for stored, rows, *shown in found:
        for sparsity, words in zip(SPARSITIES, shown, strict=True):
            best = [min(cell[f"{rival} / sparse"] for rival in RIVALS) for cell in cells(stored, int(rows))
                    if cell["sparsity"] == sparsity]  # fmt: skip
            assert words == f"{min(best):.2f} to {max(best):.2f}", (stored, rows, sparsity)


def test_bytes_and_instruction_sets_are_those_measured() -> None:
    text = read("formats.md")
    for stored, *shown in table(text[text.index("<!-- stored-bytes -->") :], "stored | 50 %"):
        assert [float(word) for word in shown] == [
            cell["of dense fp32"] for cell in measured("stored_bytes") if cell["kind"] == stored
        ], stored
    for stored, sparsity, first, *shown in table(text, "stored | sparsity"):
        (cell,) = [
            cell
            for cell in measured("instruction_sets")
            if cell["kind"] == stored and cell["sparsity"] == int(sparsity.rstrip(" %")) / 100
        ]
        assert first == f"{cell['avx512_bf16 ms']:.3f} ms"
        assert shown == [f"{cell[f'{isa} / avx512_bf16']:.2f}x" for isa in ("avx512", "avx2", "generic")]


# The pages' Python


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the pages take to be there: a base model, texts, and two finished runs on that model."""
    folder = tmp_path_factory.mktemp("docs")
    workshop = tiny.Workshop(folder / "workshop")
    for seed, name in enumerate(("mrpc", "rte")):
        words = ("--no-untouched", "--sparsity", "0.8", "--seed", str(seed), "--output", str(folder / "runs" / name))
        _train(workshop.command("adapt_prune", *words, steps=2))
    workshop.model.rename(folder / "bert-base-uncased")
    workshop.task.rename(folder / "reviews")
    return folder


def _train(arguments: list[str]) -> None:
    from sparsebert.train import main

    assert main(arguments) == 0


@pytest.fixture
def place(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder with those in it, on the path of imports; what a page registers is forgotten afterwards."""
    from sparsebert.nn import remember

    for path in runs.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "runs").unlink()
    (tmp_path / "runs").mkdir()
    for path in (runs / "runs").iterdir():
        (tmp_path / "runs" / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(remember, "path", lambda: tmp_path / "choices.json")
    methods, ops, modules, threads = dict(METHODS), dict(OPS), set(sys.modules), torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(threads)
    for name in set(sys.modules) - modules:
        if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]
    for registry, before in ((METHODS, methods), (OPS, ops)):
        registry.clear()
        registry.update(before)  # type: ignore[arg-type]


@pytest.mark.parametrize("page", [p for p in PAGES if p.name != "extending.md"], ids=lambda page: page.name)
def test_snippets_run(page: Path, place: Path) -> None:
    """All of a page's, in order and in one namespace."""
    run_python(snippets(page), page.name)


def test_the_toy_method_and_the_toy_op(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """docs/extending.md: the method trains, scores and passes its own test; the op is differentiated, compiled, run."""
    found = snippets(DOCS / "extending.md")
    run_python(found, "extending.md")
    said = capsys.readouterr()
    assert "the same to the last digit" in said.out and "prune_at 0: expected a share of the steps" in said.err
    result = json.loads((place / "runs" / "late" / "result.json").read_text(encoding="utf-8"))
    assert result["method"] == "prune_late" and result["sparsity"]["masked"] == 0.75

    # `place` still has the page's method; its own test registers it anew.
    test = importlib.import_module("test_prune_late")
    test.test_it_prunes_once_and_to_the_target(place / "apart", monkeypatch)

    reason = _load.missing("cpu") or _build.find_tools().missing()
    if reason is None:
        check_compiled_body([snippet.text for snippet in found if snippet.language == "cpp"], place)


def check_compiled_body(blocks: list[str], folder: Path) -> None:
    """Builds the page's C++ as the extension is built, but for its speed, and holds it against the reference."""
    schema, body = blocks
    source, library = folder / "squared_relu.cpp", folder / "squared_relu.so"
    source.write_text(f"{body}\nSTABLE_TORCH_LIBRARY_FRAGMENT(sparsebert, m) {{\n  {schema}}}\n", encoding="utf-8")
    tools = _build.find_tools()
    torch_folder, csrc = Path(str(tools.torch)), _build.source_dir()
    flags = [*(flag for flag in _build.CXX_FLAGS if flag != "-O3"), "-shared", f"-I{csrc}", f"-I{csrc}/cpu"]
    flags += ["-isystem", str(torch_folder / "include"), f"-L{torch_folder / 'lib'}", "-ltorch_cpu"]
    command = [str(tools.compiler), str(source), "-o", str(library), *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    torch.ops.load_library(library)

    module, op = importlib.import_module("squared_relu"), OPS["squared_relu"]
    op._picked.clear()
    assert op.missing("cpu") is None
    compiled, reference = torch.ops.sparsebert.squared_relu.default, torch.ops.sparsebert_reference.squared_relu.default
    assert op.pick(torch.device("cpu")) is compiled
    assert str(compiled._schema).split("(", 1)[1] == str(reference._schema).split("(", 1)[1]
    for shape in ((0,), (1,), (3, 5), (40_000,)):
        x = torch.randn(shape)
        assert torch.equal(module.squared_relu(x), module.squared_relu_reference(x))
    odd = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0])
    torch.testing.assert_close(module.squared_relu(odd), module.squared_relu_reference(odd), equal_nan=True)
    leaf = torch.randn(5, 3, requires_grad=True)
    torch.library.opcheck(compiled, (leaf,))
    (gradient,) = torch.autograd.grad(module.squared_relu(leaf).sum(), leaf)
    assert torch.equal(gradient, 2 * leaf.detach().clamp(min=0))
    with pytest.raises(RuntimeError, match="x: expected float32"):
        compiled(torch.randn(3, dtype=torch.float64))
