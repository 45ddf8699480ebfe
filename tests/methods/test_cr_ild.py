"""CR-ILD: mixed batches, a consistency that really runs, layers before logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from methods import students
from torch import Tensor
from training.breaks import Breaks, assert_same

from sparsebert.errors import UserError
from sparsebert.methods import Method, Phase
from sparsebert.methods.cr_ild import MixedLayers
from sparsebert.methods.mixup import Mixup, both_masks, mixed_embeddings
from sparsebert.models.capture import Capture, Needs
from sparsebert.train import main

SHARE = 0.7


@pytest.fixture
def half(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every draw is the same share."""
    monkeypatch.setattr(Mixup, "draw", lambda self: SHARE)


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tiny.Workshop:
    monkeypatch.setenv("SPARSEBERT_CACHE", str(tmp_path / "cache"))
    return tiny.Workshop(tmp_path)


def layers_phase(method: Method) -> Phase:
    """The started first phase; the module is in training mode."""
    phase = method.phases()[0]
    phase.start()
    phase.loaded()
    method.module.train()
    return phase


def small(dropout: bool = False, **settings: Any) -> Method:
    return students.pair("cr_ild", students.model(layers=1), students.model(seed=1), dropout=dropout, **settings)


# --- what is computed, against the definition -------------------------------------------------------------------------


def states(base: Any, ids: Tensor, mask: Tensor, mix: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Attention maps and hidden states of every layer, as transformers gives them, on a mixed batch or a plain one."""
    base.set_attn_implementation("eager")
    take = base.embeddings.register_forward_hook(
        lambda module, inputs, output: SHARE * output + (1 - SHARE) * output.flip(0) if mix else output
    )
    out = base(input_ids=ids, attention_mask=mask, output_attentions=True, output_hidden_states=True)
    take.remove()
    base.set_attn_implementation("sdpa")
    return list(out.attentions), list(out.hidden_states)


def map_kl(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """KL of maps over an example's own tokens."""
    total, rows = torch.zeros(()), 0
    for mine, theirs, tokens in zip(student, teacher, mask.bool(), strict=True):
        for a, b in zip(mine, theirs, strict=True):
            a, b = a[tokens][:, tokens], b[tokens][:, tokens]
            a, b = a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)
            total = total + (b * (b.log() - a.log())).sum()
            rows += int(tokens.sum())
    return total / rows


def state_mse(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    return (student - teacher)[mask.bool()].square().mean()


@pytest.mark.parametrize("ramp", [0.0, 0.25, 1.0])
def test_loss_and_gradients_are_the_definitions(half: None, ramp: float) -> None:
    method = small(consistency=2.0)
    layers_phase(method)
    method.module.memory[1] = ramp
    batch = students.batch()
    ids, mask = batch["input_ids"], batch["attention_mask"]
    union = ((mask + mask.flip(0)) > 0).long()
    base, teacher = method.context.model.base, method.context.teacher
    assert teacher is not None
    maps, hidden = states(base, ids, union, mix=True)
    with torch.no_grad():
        teacher_maps, teacher_hidden = states(teacher.base, ids, union, mix=True)
        own_maps, own_hidden = states(base, ids, mask, mix=False)
    expected = map_kl(maps[-1], teacher_maps[-1], union) + state_mse(hidden[-1], teacher_hidden[-1], union)
    for weight, part in ((SHARE, slice(None)), (1 - SHARE, range(len(ids) - 1, -1, -1))):
        place = torch.arange(len(ids))[part]
        own = map_kl(maps[-1], own_maps[-1][place], mask[place])
        own = own + state_mse(hidden[-1], own_hidden[-1][place], mask[place])
        expected = expected + 2.0 * ramp * weight * own
    wanted = torch.autograd.grad(expected, base.encoder.layer[0].attention.self.query.weight)[0]
    loss = method.module(**batch)["loss"]
    found = torch.autograd.grad(loss, base.encoder.layer[0].attention.self.query.weight)[0]
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_the_consistency_runs_from_the_second_step_and_rises() -> None:
    method = small(consistency=1e6)
    logged: list[float] = []

    def watch(phase: Phase, step: int) -> None:
        if phase.name == "ild" and step:
            logged.append(phase.logs()["consistency_loss"])

    tiny.by_hand(method, 5, watch, rate=1e-9)  # nothing moves but the ramp
    assert logged[0] == 0.0 and all(value > 0.0 for value in logged[1:])
    plain = small(consistency=0.0)
    phase = layers_phase(plain)
    plain.module(**students.batch())
    assert "consistency_loss" not in phase.logs()


@pytest.mark.parametrize("objective", ["attention", "hidden", "relations", "attention+relations", "relations+hidden"])
@pytest.mark.parametrize("layers", ["last", "uniform"])
def test_every_objective_has_its_terms_and_its_consistency(objective: str, layers: str) -> None:
    method = students.pair(
        "cr_ild", students.model(layers=2), students.model(seed=1, layers=4), objective=objective, layers=layers
    )
    phase = layers_phase(method)
    method.module.memory[1] = 1.0
    loss = method.module(**students.batch())["loss"]
    logged = phase.logs()
    assert set(logged) == {*(f"{word}_loss" for word in objective.split("+")), "consistency_loss"}
    assert sum(logged.values()) == pytest.approx(float(loss.detach()), rel=1e-5)
    assert logged["consistency_loss"] > 0.0


def test_labels_do_not_count_before_the_logits() -> None:
    losses = []
    for flip in (0, 1):
        method = small()
        layers_phase(method)
        batch = students.batch()
        losses.append(method.module(**{**batch, "labels": (batch["labels"] + flip) % 2})["loss"])
    assert torch.equal(*losses)


def test_without_mixup_it_is_plain_distillation_of_the_last_layer() -> None:
    method = small(mixup=False, consistency=0.0)
    layers_phase(method)
    objective = method.module.objective
    assert objective is not None and not isinstance(objective, MixedLayers)
    same = students.pair(
        "cr_ild", students.model(layers=1), students.model(), mixup=False, consistency=0.0, dropout=False
    )
    layers_phase(same)
    assert float(same.module(**students.batch())["loss"].detach()) > 0.0
    assert float(method.module.memory.sum()) == 0.0


# --- mixup ------------------------------------------------------------------------------------------------------------


def test_draws_are_a_function_of_seed_and_count() -> None:
    memory = torch.zeros(8, dtype=torch.float64)
    first = Mixup(3, memory)
    shares = [first.draw() for _ in range(200)]
    assert memory[0] == 200
    assert all(0.5 <= share <= 1.0 for share in shares) and len(set(shares)) == 200
    # Beta(1, 1) is uniform, so the larger part is uniform on [0.5, 1].
    assert sum(shares) / 200 == pytest.approx(0.75, abs=0.03)
    memory[0] = 120
    assert [Mixup(3, memory).draw() for _ in range(80)] == shares[120:]
    memory.zero_()
    assert Mixup(4, memory).draw() != shares[0]


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_layers_see_the_mix_of_the_embedding_outputs(kind: str) -> None:
    base = students.model(kind)
    ids = students.batch(5)["input_ids"]
    with torch.no_grad(), Capture(base, Needs(hidden=frozenset({0}))) as capture:
        base(ids)
        plain = capture.states.hidden[0]
        with mixed_embeddings(base, 0.8), Capture(base, Needs(hidden=frozenset({0}))) as inner:
            base(ids)
            mixed = inner.states.hidden[0]
        base(ids)
    torch.testing.assert_close(mixed, 0.8 * plain + 0.2 * plain.flip(0))
    torch.testing.assert_close(mixed[2], plain[2])  # of an odd number the middle one is its own partner
    assert torch.equal(capture.states.hidden[0], plain)
    with pytest.raises(RuntimeError), mixed_embeddings(base, 0.8):
        raise RuntimeError
    assert not base.embeddings._forward_hooks


def test_the_mask_is_that_of_both() -> None:
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0]])
    batch = {"input_ids": torch.ones(3, 4), "attention_mask": mask}
    assert both_masks(batch)["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 0]]
    assert both_masks({"input_ids": mask}).keys() == {"input_ids"}
    assert torch.equal(batch["attention_mask"], mask)


def test_teacher_and_student_get_the_same_mix(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []
    monkeypatch.setattr("sparsebert.methods.cr_ild.mixed_embeddings", lambda base, share: seen.append(share))
    method = small()
    layers_phase(method)
    for _ in range(3):
        method.module(**students.batch())
    assert len(seen) == 6 and seen[0::2] == seen[1::2] and len(set(seen)) == 3


# --- precision, runs --------------------------------------------------------------------------------------------------


def test_bf16_reaches_every_weight() -> None:
    method, wide = small(), small()
    gradients: list[dict[str, Tensor]] = []
    for one, precision in ((method, torch.bfloat16), (wide, torch.float32)):
        layers_phase(one)
        one.module.memory[1] = 1.0
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision is torch.bfloat16):
            loss = one.module(**students.batch())["loss"]
        assert loss.dtype == torch.float32
        loss.backward()
        trained = {name: p for name, p in one.module.named_parameters() if p.requires_grad}
        assert [name for name, p in trained.items() if p.grad is None] == []
        gradients.append({name: p.grad for name, p in trained.items() if p.grad is not None})
    name = "model.base.encoder.layer.0.output.dense.weight"
    half, full = (gradient[name].flatten() for gradient in gradients)
    assert torch.nn.functional.cosine_similarity(half, full, dim=0) > 0.98


def test_an_interrupted_run_is_the_straight_one(
    shop: tiny.Workshop, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--teacher-max-steps", "2", "--save-strategy", "steps", "--save-steps", "2", "--consistency", "3")
    words += ("--ild-batch-size", "0", "--gradient-accumulation-steps", "2")
    straight = shop.run("cr_ild", *words, steps=4)
    assert [phase["phase"] for phase in straight.result["phases"]] == ["ild", "kd"]
    assert straight.numbers("consistency_loss", "ild")[0] == 0.0 < straight.numbers("consistency_loss", "ild")[1]
    breaks = Breaks(monkeypatch)
    command = shop.command("cr_ild", *words, steps=4)
    folder = Path(command[command.index("--output") + 1])
    breaks.signal_at("ild", 3)
    assert main(command) == 130
    breaks.signal_at("kd", 2)
    assert main(["--resume", str(folder)]) == 130
    assert main(["--resume", str(folder)]) == 0
    assert_same(straight.folder, folder)


def test_phases_have_epochs_rates_and_batches_of_their_own(shop: tiny.Workshop) -> None:
    words = ("--teacher-max-steps", "2", "--max-steps", "-1", "--ild-epochs", "2", "--num-train-epochs", "1")
    outcome = shop.run("cr_ild", *words, "--ild-batch-size", "16", "--ild-learning-rate", "1e-3", steps=0)
    assert [phase["steps"] for phase in outcome.result["phases"]] == [6, 6]  # 48 examples by 16 twice, by 8 once
    assert max(outcome.numbers("learning_rate", "ild")) > 5e-4 > max(outcome.numbers("learning_rate", "kd"))


def test_layers_are_distilled_on_other_text(shop: tiny.Workshop) -> None:
    text = shop.folder / "text.txt"
    text.write_text("\n".join(" ".join(tiny.WORDS[5 + i : 9 + i]) for i in range(8)) * 20, encoding="utf-8")
    words = ("--teacher-max-steps", "2", "--text", str(text), "--text-length", "12", "--supplementary")
    outcome = shop.run("cr_ild", *words, "--eval-strategy", "steps", "--eval-steps", "2", steps=3)
    assert outcome.result["text"]["blocks"]["train"] > 0
    watched = {entry["phase"] for entry in outcome.log if "eval_loss" in entry}
    assert watched == {"kd"}
    assert main(shop.command("cr_ild", *words[:2], "--supplementary")) == 2
    assert main(shop.command("cr_ild", *words[:6])) == 2


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"objective": "attention+embeddings"}, "objective 'embeddings'"),
        ({"objective": ""}, "objective"),
        ({"objective": "hidden+hidden"}, "once"),
        ({"layers": "first"}, "layers"),
        ({"mixup_alpha": 0.0}, "mixup_alpha"),
        ({"consistency": -0.1}, "consistency"),
        ({"mixup": False}, "consistency"),
        ({"objective": "relations", "relation_heads": 3}, "relation_heads 3"),
        ({"objective": "relations", "relation_heads": -1}, "relation_heads"),
    ],
)
def test_what_cannot_be_is_refused_by_name(settings: dict[str, Any], word: str) -> None:
    with pytest.raises(UserError, match=word):
        small(**settings)
