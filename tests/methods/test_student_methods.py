"""Methods whose result is a dense student: what each compares, and what all of them promise."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from methods import students
from torch import Tensor
from torch.nn import functional as F
from training.breaks import Breaks, assert_same

from sparsebert.errors import UserError
from sparsebert.methods import Method
from sparsebert.methods.bert_emd import new_weights, transport
from sparsebert.methods.mixup import Mixup
from sparsebert.train import main

NAMES = ("bert_emd", "cr_ild", "kd", "minilm", "mix_kd", "pkd", "tinybert")
TWO_PHASES = ("bert_emd", "cr_ild", "minilm", "tinybert")


def start(method: Method) -> Any:
    """The first phase, started; the module is in training mode."""
    phase = method.phases()[0]
    phase.start()
    phase.loaded()
    method.module.train()
    return phase


def outputs(base: Any, batch: dict[str, Tensor]) -> Any:
    """Maps, scores under them, and states of every layer, as transformers gives them."""
    base.set_attn_implementation("eager")
    out = base(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        output_hidden_states=True,
        output_attentions=True,
    )
    base.set_attn_implementation("sdpa")
    return out


def scores(base: Any, hidden: list[Tensor], layer: int) -> Tensor:
    """`q k^T / sqrt(d)` of a BERT's layer, from 0."""
    own = base.encoder.layer[layer].attention.self
    heads = int(base.config.num_attention_heads)
    q, k = (linear(hidden[layer]).unflatten(-1, (heads, -1)).transpose(1, 2) for linear in (own.query, own.key))
    return q @ k.mT / q.shape[-1] ** 0.5


def pairs_mse(a: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    """Mean squared difference of scores over pairs of tokens."""
    both = (mask.bool()[:, :, None] & mask.bool()[:, None, :])[:, None].expand(a.shape)
    return (a - b)[both].square().mean()


def tokens_mse(a: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    return (a - b)[mask.bool()].square().mean()


# --- what all promise -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_student_learns_and_the_teacher_stays(name: str) -> None:
    method = students.pair(name, students.model(seed=3), students.model(seed=1), student_layers=1, dropout=False)
    teacher = method.context.teacher
    assert teacher is not None
    with torch.no_grad():
        teacher.head.get_parameter("output.weight").mul_(50.0)  # it has something to say
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    losses: dict[str, list[float]] = {}
    for phase in method.phases():
        phase.start()
        phase.loaded()
        method.module.train()
        optimizer = torch.optim.AdamW([g for g in phase.parameter_groups(1e-2) if g["params"]], lr=1e-2)
        for step in range(1, 26):
            loss = method.module(**students.batch(8))["loss"]
            optimizer.zero_grad()
            loss.backward()
            phase.before_step(step, 25)
            optimizer.step()
            phase.after_step(step, 25)
            losses.setdefault(phase.name, []).append(float(loss.detach()))
        phase.finish()
        assert method.module.objective is None
    assert list(losses) == (["ild", "kd"] if name in TWO_PHASES else ["distill"])
    for values in losses.values():
        assert sum(values[-5:]) < 0.97 * sum(values[:5]), values
    assert all(torch.equal(before[key], value) for key, value in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters()) and method.finish() == {}
    assert len(method.context.model.base.encoder.layer) == 1


@pytest.mark.parametrize("task", ["regression", "span"])
@pytest.mark.parametrize("name", NAMES)
def test_every_kind_of_task(name: str, task: str) -> None:
    def build() -> Method:
        return students.pair(name, students.model(layers=1), students.model(seed=1), task)

    if (name, task) == ("mix_kd", "span"):
        with pytest.raises(UserError, match="spans"):
            build()
        return
    method = build()
    for phase in method.phases():
        phase.start()
        phase.loaded()
        loss = method.module.train()(**students.batch(task=task))["loss"]
        assert bool(loss.isfinite())
        loss.backward()
        phase.finish()


@pytest.mark.parametrize("name", NAMES)
def test_bf16_autocast_gives_every_weight_a_gradient(name: str) -> None:
    method = students.pair(name, students.model(layers=1), students.model(seed=1))
    for phase in method.phases():
        phase.start()
        phase.loaded()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = method.module.train()(**students.batch())["loss"]
        assert loss.dtype == torch.float32
        loss.backward()
        assert [n for n, p in method.module.named_parameters() if p.requires_grad and p.grad is None] == []
        phase.finish()


@pytest.mark.parametrize("name", [*TWO_PHASES, "mix_kd"])
def test_the_state_that_is_saved_has_the_same_keys_in_every_phase(name: str) -> None:
    method = students.pair(name, students.model(width=8), students.model(seed=1))
    keys = [list(method.module.state_dict())]
    for phase in method.phases():
        phase.start()
        keys.append(list(method.module.state_dict()))
        phase.finish()
    assert all(later == keys[0] for later in keys)


def test_bert_emd_goes_on_with_the_weights_of_its_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSEBERT_CACHE", str(tmp_path / "cache"))
    shop = tiny.Workshop(tmp_path)
    words = ("--teacher-max-steps", "1", "--student-layers", "-1")
    straight = shop.run("bert_emd", *words, steps=3)
    breaks = Breaks(monkeypatch)
    command = shop.command("bert_emd", *words, steps=3)
    folder = Path(command[command.index("--output") + 1])
    breaks.signal_at("ild", 2)
    assert main(command) == 130
    assert main(["--resume", str(folder)]) == 0
    assert_same(straight.folder, folder)


BAD: list[tuple[str, dict[str, Any], str]] = [
    *((name, {"student_layers": 3}, "student_layers 3") for name in NAMES),
    *((name, {"student_layers": -2}, "student_layers -2") for name in NAMES),
    *((name, {"head_learning_rate": -1.0}, "head_learning_rate") for name in NAMES),
    *((name, {"temperature": 0.0}, "temperature") for name in NAMES),
    *((name, {"hard_labels": 1.5}, "hard_labels") for name in NAMES),
    *((name, {"ild_epochs": 0.0}, "ild_epochs") for name in TWO_PHASES),
    *((name, {"ild_learning_rate": -1e-5}, "ild_learning_rate") for name in TWO_PHASES),
    *((name, {"ild_batch_size": -1}, "ild_batch_size") for name in TWO_PHASES),
    ("pkd", {"patience": -1.0}, "patience"),
    ("pkd", {"layers": "all"}, "layers"),
    ("mix_kd", {"mixed": float("inf")}, "mixed"),
    ("mix_kd", {"mixup_alpha": 0.0}, "mixup_alpha"),
    ("minilm", {"relation_heads": 3}, "relation_heads 3"),
    ("minilm", {"teacher_layer": 3}, "teacher_layer 3"),
    ("bert_emd", {"emd_temperature": 0.0}, "emd_temperature"),
]


@pytest.mark.parametrize(("name", "settings", "word"), BAD)
def test_a_setting_out_of_range_is_refused_by_name(name: str, settings: dict[str, Any], word: str) -> None:
    with pytest.raises(UserError, match=word) as error:
        students.pair(name, students.model(), students.model(seed=1), **settings)
    assert "expected" in str(error.value) or "known:" in str(error.value)


@pytest.mark.parametrize(
    ("name", "student", "teacher", "settings", "word"),
    [
        ("tinybert", {"layers": 2}, {"layers": 3}, {}, "2 layers cannot be mapped to a teacher of 3"),
        ("cr_ild", {"layers": 2}, {"layers": 3}, {"layers": "uniform"}, "cannot be mapped"),
        ("pkd", {"layers": 2}, {"layers": 3}, {}, "cannot be mapped"),
        ("pkd", {"layers": 3}, {"layers": 2}, {"layers": "last"}, "cannot be mapped"),
        ("pkd", {"width": 8}, {"width": 16}, {}, "tinybert"),
        *((name, {"width": 16}, {"width": 8}, {}, "16 wide") for name in ("tinybert", "bert_emd", "cr_ild")),
        *((name, {"heads": 2}, {"heads": 4}, {}, "2 heads .* 4") for name in ("tinybert", "bert_emd", "cr_ild")),
        ("minilm", {"width": 16}, {"width": 24}, {"relation_heads": 3}, "divisor of 8"),
    ],
)
def test_models_that_do_not_fit_are_refused_by_name(
    name: str, student: dict[str, int], teacher: dict[str, int], settings: dict[str, Any], word: str
) -> None:
    with pytest.raises(UserError, match=word):
        students.pair(name, students.model(**student), students.model(seed=1, **teacher), **settings)


# --- what each compares, against the definition -----------------------------------------------------------------------


def test_tinybert_sums_scores_and_states_over_all_layers() -> None:
    method = students.pair("tinybert", students.model(width=8), students.model(seed=1, layers=4), dropout=False)
    start(method)
    batch = students.batch()
    mask, base, teacher = batch["attention_mask"], method.context.model.base, method.context.teacher
    assert teacher is not None
    mine, theirs = outputs(base, batch).hidden_states, outputs(teacher.base, batch).hidden_states
    project = method.module.extra["project"]
    expected = sum(tokens_mse(project(mine[i]), theirs[2 * i], mask) for i in range(3))
    expected = expected + sum(
        pairs_mse(scores(base, mine, i), scores(teacher.base, theirs, 2 * i + 1), mask) for i in range(2)
    )
    loss = method.module(**batch)["loss"]
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    loss.backward()
    assert project.weight.grad is not None
    last = method.phases()[1]
    last.start()
    assert not project.weight.requires_grad, "the second phase has nothing to project"


@pytest.mark.parametrize("layer", [0, 1])
def test_minilm_compares_relations_of_one_layer_of_any_shape(layer: int) -> None:
    method = students.pair(
        "minilm",
        students.model(width=8, heads=2),
        students.model(seed=1, layers=3),
        relation_heads=4,
        teacher_layer=layer,
        dropout=False,
    )
    start(method)
    batch = students.batch()
    batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    teacher = method.context.teacher
    assert teacher is not None
    expected = torch.zeros(())
    mine = outputs(method.context.model.base, batch).hidden_states
    theirs = outputs(teacher.base, batch).hidden_states
    chosen = (layer or 3) - 1
    for kind in ("query", "key", "value"):
        logs = []
        for base, hidden, at in ((method.context.model.base, mine, 1), (teacher.base, theirs, chosen)):
            x = getattr(base.encoder.layer[at].attention.self, kind)(hidden[at]).unflatten(-1, (4, -1)).transpose(1, 2)
            logs.append((x @ x.mT / x.shape[-1] ** 0.5).log_softmax(-1))
        expected = expected + (logs[1].exp() * (logs[1] - logs[0])).sum(-1).mean()
    torch.testing.assert_close(method.module(**batch)["loss"], expected, rtol=1e-5, atol=1e-6)


def test_minilm_chooses_heads_that_divide() -> None:
    def heads(width: int) -> int:
        method = students.pair("minilm", students.model(width=width), students.model(seed=1, width=width))
        return method.layer_terms()[0].heads  # type: ignore[attr-defined, no-any-return]

    assert (heads(48), heads(16)) == (48, 4)


@pytest.mark.parametrize(("layers", "expected"), [("skip", [(1, 2), (2, 4)]), ("last", [(1, 4), (2, 5)])])
def test_pkd_is_patient_with_the_layers_in_between(layers: str, expected: list[tuple[int, int]]) -> None:
    method = students.pair(
        "pkd", students.model(layers=3), students.model(seed=1, layers=6), layers=layers, dropout=False
    )
    phase = start(method)
    batch, teacher = students.batch(), method.context.teacher
    assert teacher is not None
    mine, theirs = (outputs(base, batch).hidden_states for base in (method.context.model.base, teacher.base))
    wanted = 0.0
    for i, j in expected:
        a, b = (F.normalize(state[:, 0].detach(), dim=-1) for state in (mine[i], theirs[j]))
        wanted += float((a - b).square().mean()) / 2
    method.module(**batch)
    assert phase.logs()["patience_loss"] == pytest.approx(100.0 * wanted, rel=1e-4)


def test_pkd_of_one_layer_takes_the_last() -> None:
    method = students.pair("pkd", students.model(layers=1), students.model(seed=1, layers=4))
    assert list(start(method).pairs) == [(1, 4)]


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_mix_kd_learns_both_labels_by_their_shares(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Mixup, "draw", lambda self: 0.7)
    method = students.pair(
        "mix_kd", students.model(layers=1), students.model(seed=1), task, hard_labels=1.0, mixed=2.0, dropout=False
    )
    phase = start(method)
    batch, model = students.batch(task=task), method.context.model
    union = ((batch["attention_mask"] + batch["attention_mask"].flip(0)) > 0).long()
    handle = model.base.embeddings.register_forward_hook(lambda m, i, out: 0.7 * out + 0.3 * out.flip(0))
    logits = model(batch["input_ids"], union)["logits"]
    handle.remove()
    loss = F.mse_loss if task == "regression" else F.cross_entropy
    labels = batch["labels"]
    mixed = 0.7 * loss(logits, labels) + 0.3 * loss(logits, labels.flip(0))
    real = model(**batch)["loss"]
    torch.testing.assert_close(method.module(**batch)["loss"], real + 2.0 * mixed, rtol=1e-5, atol=1e-6)
    assert phase.logs()["mixed_labels_loss"] == pytest.approx(2.0 * float(mixed.detach()), rel=1e-5)


# --- the earth mover --------------------------------------------------------------------------------------------------

MASSES = st.integers(1, 4).flatmap(lambda size: st.lists(st.floats(0.05, 1.0), min_size=size, max_size=size))


@settings(max_examples=40, deadline=None)
@given(student=MASSES, teacher=MASSES, seed=st.integers(0, 9), scale=st.sampled_from([1e-9, 1.0, 1e6]))
def test_a_flow_moves_all_mass_at_no_more_than_any_other(
    student: list[float], teacher: list[float], seed: int, scale: float
) -> None:
    first, second = (np.array(masses) / sum(masses) for masses in (student, teacher))
    costs = np.random.RandomState(seed).random_sample((len(first), len(second))) * scale
    flow = transport(costs, first, second)
    np.testing.assert_allclose(flow.sum(1), first, atol=1e-9)
    np.testing.assert_allclose(flow.sum(0), second, atol=1e-9)
    assert (flow >= 0).all()
    assert (flow * costs).sum() <= (np.outer(first, second) * costs).sum() * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_equal_masses_are_the_best_assignment(seed: int) -> None:
    costs = np.random.RandomState(seed).random_sample((4, 4))
    flow = transport(costs, np.full(4, 0.25), np.full(4, 0.25))
    best = min(sum(costs[i, order[i]] for i in range(4)) / 4 for order in permutations(range(4)))
    assert (flow * costs).sum() == pytest.approx(best, abs=1e-12)
    assert np.array_equal(flow, transport(costs, np.full(4, 0.25), np.full(4, 0.25)))


def test_cheap_layers_gain_weight() -> None:
    masses = np.array([0.5, 0.25, 0.25])
    new = new_weights(np.array([0.5, 0.05, 0.25]), masses, 1.0)  # costs per mass: 1, 0.2, 1
    assert new.sum() == pytest.approx(1.0)
    assert new[1] > new[0] == pytest.approx(new[2])
    spread = new_weights(np.array([0.5, 0.05, 0.25]), masses, 10.0)
    assert new[1] > spread[1] > spread[0]
    assert np.array_equal(new_weights(np.zeros(3), masses, 1.0), masses)
    assert np.isfinite(new_weights(np.array([0.0, 1.0, 1.0]), masses, 1.0)).all()


def test_bert_emd_is_the_distance_of_both_and_moves_its_weights() -> None:
    method = students.pair("bert_emd", students.model(), students.model(seed=1, layers=3), dropout=False)
    start(method)
    batch = students.batch()
    mask, base, teacher = batch["attention_mask"], method.context.model.base, method.context.teacher
    assert teacher is not None
    with torch.no_grad():
        mine, theirs = outputs(base, batch).hidden_states, outputs(teacher.base, batch).hidden_states
        costs = [np.zeros((2, 3)), np.zeros((2, 3))]
        for i in range(2):
            for j in range(3):
                a, b = scores(base, mine, i), scores(teacher.base, theirs, j)
                costs[0][i, j] = float(pairs_mse(a, b, mask))
                costs[1][i, j] = float(tokens_mse(mine[i + 1], theirs[j + 1], mask))
    expected = sum(float((transport(cost, np.full(2, 1 / 2), np.full(3, 1 / 3)) * cost).sum()) for cost in costs)
    loss = method.module(**batch)["loss"]
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-4)
    weights: Any = method.module.extra["layers"]
    for mass in (weights.student, weights.teacher):
        assert float(mass.sum()) == pytest.approx(1.0) and len(set(mass.tolist())) > 1
    loss.backward()
    still = students.pair("bert_emd", students.model(), students.model(seed=1, layers=3), cost_attention=False)
    start(still)
    still.module(**batch)
    assert still.module.extra["layers"].student.tolist() == [0.5, 0.5]  # type: ignore[union-attr]


def test_a_loss_that_is_not_finite_stays_so_in_bert_emd() -> None:
    method = students.pair("bert_emd", students.model(), students.model(seed=1))
    start(method)
    with torch.no_grad():
        method.context.model.base.encoder.layer[0].attention.self.query.weight[0, 0] = float("nan")
    assert not bool(method.module(**students.batch())["loss"].isfinite())
    assert bool(method.module.extra["layers"].student.isfinite().all())  # type: ignore[union-attr]
