"""Methods through the command: what lies in the saved files is what the method promises."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from transformers import AutoModel

from sparsebert.methods.gmp import cubic_sparsity
from sparsebert.patterns import units_to_prune


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> tiny.Workshop:
    return tiny.Workshop(tmp_path_factory.mktemp("workshop"))


def test_adapt_prune_saves_the_pretrained_weights_and_exact_zeros(workshop: tiny.Workshop) -> None:
    outcome = workshop.run("adapt_prune", "--masked", "encoder", "embeddings", "--sparsity", "0.6", steps=6)
    outcome.check_zeros()
    outcome.check_survivors()
    pruned, total = outcome.pruned()
    assert pruned == units_to_prune(0.6, total)
    assert total == 2 * (4 * 16 * 16 + 2 * 16 * 32) + (24 + 20 + 4) * 16
    assert outcome.result["sparsity"]["masked"] == pruned / total
    assert outcome.result["sparsity"]["pruned"] == pruned
    assert outcome.result["sparsity"]["target"] == 0.6
    assert set(outcome.result["untouched"]) >= {"accuracy"}
    assert [phase["phase"] for phase in outcome.result["phases"]] == ["untouched", "prune"]
    assert outcome.numbers("sparsity", "prune")[-1] == pytest.approx(0.6, abs=1e-3)
    base = AutoModel.from_pretrained(outcome.folder / "model")
    assert all(torch.equal(tensor, outcome.after[name]) for name, tensor in base.state_dict().items())


def test_the_published_adapt_prune_stops_at_the_target(workshop: tiny.Workshop) -> None:
    outcome = workshop.run(
        *("adapt_prune", "--pattern", "block:4x4", "--no-untouched", "--init", "normal", "--gamma", "2e-3"),
        *("--after-target", "stop", "--sparsity", "0.5"),
        steps=20,
    )
    outcome.check_survivors()
    assert outcome.pruned() == (2048, 4096)
    assert outcome.result["phases"][0]["steps"] < 20


@pytest.mark.parametrize(("name", "pattern"), [("magnitude", "2:4"), ("random", "heads"), ("gmp", "neurons")])
def test_pretrained_weights_survive_bit_for_bit(workshop: tiny.Workshop, name: str, pattern: str) -> None:
    outcome = workshop.run(name, "--pattern", pattern, "--weights", "pretrained", "--no-untouched", steps=3)
    outcome.check_zeros()
    outcome.check_survivors()
    pruned, total = outcome.pruned()
    assert pruned * 2 == total


def test_gmp_logs_a_cubic_rise_and_keeps_zeros(workshop: tiny.Workshop) -> None:
    outcome = workshop.run("gmp", "--pattern", "block:4x4", "--sparsity", "0.75", "--no-untouched", steps=10)
    outcome.check_zeros()
    assert outcome.pruned() == (3072, 4096)
    # Ten steps: from the first to the seventh, over 256 blocks.
    due = [cubic_sparsity((step - 1) / 6, 0.75) for step in range(1, 8)] + [0.75] * 3
    assert outcome.numbers("sparsity", "prune") == [units_to_prune(level, 256) / 256 for level in due]
    assert not torch.equal(
        outcome.after["encoder.layer.0.output.dense.bias"], outcome.before["encoder.layer.0.output.dense.bias"]
    )


def test_imp_goes_through_its_rounds(workshop: tiny.Workshop) -> None:
    outcome = workshop.run("imp", "--prune-rate", "0.5", "--sparsity", "0.7", "--no-untouched", steps=2)
    outcome.check_zeros()
    assert [phase["phase"] for phase in outcome.result["phases"]] == ["round1", "round2", "finetune"]
    levels = [outcome.numbers("sparsity", phase)[0] for phase in ("round1", "round2", "finetune")]
    assert levels == [0.0, 0.5, units_to_prune(0.7, 4096) / 4096]
    assert outcome.pruned()[0] == units_to_prune(0.7, 4096)


def test_random_is_repeated_by_its_seed(workshop: tiny.Workshop) -> None:
    def run(seed: str) -> tiny.Outcome:
        return workshop.run("random", "--seed", seed, "--no-untouched", steps=2)

    first, again, other = run("1"), run("1"), run("2")
    assert all(torch.equal(first.after[name], again.after[name]) for name in first.after)
    assert any(not torch.equal(first.masks[name], other.masks[name]) for name in first.masks)


def test_feature_extraction_saves_the_very_base(workshop: tiny.Workshop) -> None:
    outcome = workshop.run("feature_extraction", steps=2)
    assert outcome.masks == {}
    outcome.check_survivors()
    assert outcome.result["pattern"] is None


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--method", "imp", "--prune-rate", "1.5"), "prune_rate 1.5"),
        (("--method", "gmp", "--prunings", "0"), "prunings 0"),
        (("--method", "adapt_prune", "--init-std", "-1"), "init_std -1"),
        (("--method", "magnitude", "--pattern", "block:5x5"), "block:5x5"),
        (("--method", "random", "--pattern", "head"), "did you mean 'heads'"),
        (("--method", "random", "--pattern", "2:4", "--sparsity", "0.6"), "2:4"),
        (("--method", "random", "--pattern", "heads", "--masked", "embeddings"), "embeddings"),
        (("--method", "random", "--sparsity", "1"), "sparsity 1"),
    ],
)
def test_what_cannot_be_is_said_on_one_line(
    workshop: tiny.Workshop, words: tuple[str, ...], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from sparsebert.train import main

    assert main(workshop.command(words[1], *words[2:])) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and "\n" not in error
    assert named in error
    assert not Path(workshop.folder / f"run{workshop.runs}").exists()


def test_round_steps_are_those_of_the_rounds_that_prune(workshop: tiny.Workshop) -> None:
    outcome = workshop.run("imp", "--sparsity", "0.36", "--round-steps", "2", steps=4)
    assert [phase["steps"] for phase in outcome.result["phases"]] == [4, 2, 2, 4]
