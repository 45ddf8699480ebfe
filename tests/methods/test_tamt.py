"""TAMT against the paper's algorithm: identity gradients, exact thresholds, frozen weights, masks that are reused."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F
from training.breaks import Breaks, PowerCut, assert_same
from transformers import AutoModelForMaskedLM

from sparsebert.errors import UserError
from sparsebert.methods import Method, Phase
from sparsebert.methods.pretraining import two_segments
from sparsebert.methods.tamt import search_steps
from sparsebert.patterns import units_to_prune
from sparsebert.train import main

OBJECTIVES = ("mlm", "kd", "mlm+kd")
PARTS = ("encoder", "word_embeddings")
QUICK = ("--search-steps", "4", "--search-batch-size", "4", "--train-mlm-head", "2", "--text-length", "10",
         "--no-untouched")  # fmt: skip


def searching(objective: str = "mlm", **settings: Any) -> tuple[Method, Phase]:
    """A method in its search, ready for the first step, without dropout."""
    method = tiny.build("tamt", objective=objective, **{"masked": PARTS, "allocation": "matrix", **settings})
    phase = next(phase for phase in method.phases() if phase.name == "search")
    phase.start()
    phase.loaded()
    method.module.train()
    for module in method.module.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for layer in method.context.model.base.encoder.layer:
        layer.attention.self.dropout.p = 0.0
    return method, phase


def scores_of(method: Method) -> list[Tensor]:
    return list(method.masks.scores or [])


def expected_loss(method: Method, objective: str, batch: dict[str, Tensor], masks: dict[str, Tensor]) -> Tensor:
    """The published losses, written out on the plain model with weights times dense masks."""
    base, config = tiny.base(), tiny.config()
    plain = {name: tensor.detach() for name, tensor in base.named_parameters()}
    sparse = {**plain, **{f"{name}.weight": plain[f"{name}.weight"] * mask for name, mask in masks.items()}}
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "output_hidden_states": True}
    states = functional_call(base, sparse, (), inputs).hidden_states
    loss = torch.zeros(())
    if "mlm" in objective:
        head = method.module.extra["mlm_head"]
        hidden = F.layer_norm(F.gelu(head.dense(states[-1])), (16,), head.norm.weight, head.norm.bias, 1e-12)
        logits = F.linear(hidden, sparse["embeddings.word_embeddings.weight"], head.bias)
        loss = loss + F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
    if "kd" in objective:
        dense = functional_call(base, plain, (), inputs).hidden_states
        pairs = list(zip(states, dense, strict=True))[1:]
        assert len(pairs) == config.num_hidden_layers
        loss = loss + sum((1 - F.cosine_similarity(s, d, dim=-1)).mean() for s, d in pairs) / len(pairs)
    return loss


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_scores_get_the_gradient_of_the_mask_as_it_is(objective: str) -> None:
    method, phase = searching(objective, sparsity=0.4, segments=False)
    batch = tiny.batch(phase, 4)
    dense = {name: mask.float().requires_grad_() for name, mask in method.masks.dense().items()}
    expected = expected_loss(method, objective, batch, dense)
    expected.backward()
    method.module.zero_grad()
    loss = method.module(**batch)["loss"]
    torch.testing.assert_close(loss, expected)
    loss.backward()
    phase.before_step(1, 10)
    for group, score in zip(method.masks.groups, scores_of(method), strict=True):
        torch.testing.assert_close(score.grad, dense[group.views[0].matrix.name].grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_only_scores_and_the_heads_of_the_loss_are_trained(objective: str) -> None:
    method, phase = searching(objective, score_learning_rate=3e-4)
    trained = {name for name, parameter in method.module.named_parameters() if parameter.requires_grad}
    head = {name for name, _ in method.module.named_parameters() if name.startswith("extra.mlm_head.")}
    assert trained == head | {f"masks.scores.{index}" for index in range(13)}
    assert bool(head) == ("mlm" in objective)
    groups = phase.parameter_groups(phase.training()["learning_rate"])
    assert {(group["lr"], group["weight_decay"]) for group in groups} == {(3e-4, 0.0)}


def test_the_published_rates_and_steps_are_the_defaults() -> None:
    rates = {name: searching(name, sparsity=0.7)[1].training()["learning_rate"] for name in OBJECTIVES}
    assert rates == {"mlm": 5e-5, "kd": 2e-5, "mlm+kd": 5e-5}
    published = {0.2: 3000, 0.3: 6000, 0.4: 8000, 0.5: 11000, 0.6: 14000, 0.7: 17000, 0.8: 20000, 0.9: 22000}
    assert {sparsity: search_steps(sparsity) for sparsity in published} == published
    assert (search_steps(0.0), search_steps(0.65), search_steps(0.999)) == (3000, 15500, 22000)
    training = searching(sparsity=0.7)[1].training()
    assert (training["max_steps"], training["per_device_train_batch_size"]) == (17000, 16)
    assert searching(search_steps=7)[1].training()["max_steps"] == 7


def test_scores_have_two_first_values_those_of_one_shot_magnitude() -> None:
    method, _ = searching(sparsity=0.7)
    for (name, weight), score in zip(method.masks.weights().items(), scores_of(method), strict=True):
        assert score.detach().unique().tolist() == pytest.approx([0.0, 0.02])
        pruned = units_to_prune(0.7, weight.numel())
        assert int((score == 0).sum()) == pruned
        smallest = weight.abs().flatten().argsort(stable=True)[:pruned]
        assert bool((score.flatten()[smallest] == 0).all()), name
        assert torch.equal(method.masks.dense()[name], score > 0.01)


@pytest.mark.parametrize("allocation", ["matrix", "global"])
def test_graded_first_scores_are_the_magnitudes_and_begin_with_the_same_mask(allocation: str) -> None:
    published, _ = searching(sparsity=0.7, allocation=allocation)
    method, _ = searching(init="graded", sparsity=0.7, allocation=allocation)
    assert all(torch.equal(a, b) for a, b in zip(method.masks.units(), published.masks.units(), strict=True))
    scales = []
    for weight, score in zip(method.masks.weights().values(), scores_of(method), strict=True):
        assert score.dtype == torch.float32
        scales.append((score.detach() / weight.abs()).flatten())
        assert torch.allclose(scales[-1], scales[-1][:1].expand_as(scales[-1]), rtol=1e-4)
        if allocation == "matrix":
            assert float(score.detach().mean()) == pytest.approx(0.02, rel=1e-4)
    if allocation == "global":
        assert torch.allclose(torch.stack([scale[0] for scale in scales]), scales[0][0].expand(len(scales)), rtol=1e-4)


def test_random_first_scores_are_those_of_the_seed() -> None:
    def first(seed: int) -> Tensor:
        method, _ = searching(init="random", seed=seed, sparsity=0.7)
        assert method.masks.sparsity() == pytest.approx(0.7, abs=0.01)
        return torch.cat([score.detach().flatten() for score in scores_of(method)])

    assert torch.equal(first(1), first(1)) and not torch.equal(first(1), first(2))


def test_every_matrix_is_at_the_target_after_every_step_and_connections_come_back() -> None:
    method = tiny.build("tamt", sparsity=0.7, masked=PARTS, allocation="matrix")
    gone: list[Tensor] = []
    came_back = 0

    def watch(phase: Phase, step: int) -> None:
        nonlocal gone, came_back
        if phase.name != "search":
            return
        units = method.masks.units()
        assert [int((~unit).sum()) for unit in units] == [units_to_prune(0.7, unit.numel()) for unit in units]
        came_back += sum(int((unit & old).sum()) for unit, old in zip(units, gone, strict=False))
        gone = [~unit for unit in units]

    tiny.by_hand(method, 15, watch)
    assert came_back > 0


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_search_lowers_its_loss_on_frozen_weights(objective: str) -> None:
    method, phase = searching(objective, sparsity=0.6)
    first = {name: tensor.clone() for name, tensor in method.context.model.state_dict().items()}
    optimizer = torch.optim.Adam(phase.parameter_groups(3e-3))
    batch = tiny.batch(phase, 32, torch.Generator().manual_seed(0))
    losses = []
    for step in range(1, 41):
        optimizer.zero_grad()
        loss = method.module(**batch)["loss"]
        loss.backward()
        losses.append(float(loss.detach()))
        phase.before_step(step, 40)
        optimizer.step()
        phase.after_step(step, 40)
    assert losses[-1] < 0.9 * losses[0]
    assert phase.logs()["sparsity"] == pytest.approx(0.6, abs=0.01)
    left = method.context.model.state_dict()
    assert all(torch.equal(left[name], tensor) for name, tensor in first.items())


def test_nothing_pruned_is_no_distance_from_the_dense_model() -> None:
    method, phase = searching("kd", sparsity=0.0)
    assert float(method.module(**tiny.batch(phase, 4))["loss"].detach()) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("masked", [("encoder", "pooler"), ("encoder", "pooler", "word_embeddings")])
def test_the_mask_of_the_pooler_stays_as_it_began(masked: tuple[str, ...]) -> None:
    method = tiny.build("tamt", sparsity=0.5, masked=masked, allocation="matrix")
    seen: list[Tensor] = []
    tiny.by_hand(method, 5, lambda phase, step: seen.append(method.masks.dense()["pooler.dense"]), rate=0.1)
    searched = seen[6:]
    assert all(torch.equal(mask, searched[0]) for mask in searched)
    assert int((~searched[0]).sum()) == units_to_prune(0.5, searched[0].numel())


def test_fine_tuning_begins_with_the_pretrained_weights_and_a_new_head() -> None:
    method = tiny.build("tamt", sparsity=0.6, masked=PARTS, untouched=True)
    first = {name: tensor.clone() for name, tensor in method.context.model.state_dict().items()}
    checked = []

    def watch(phase: Phase, step: int) -> None:
        if phase.name == "finetune":
            masks = method.masks.dense()
            now = method.context.model.state_dict()
            for name, mask in masks.items():
                assert bool((now[f"base.{name}.weight"][~mask] == 0).all())
            if step == 0:
                for name, tensor in now.items():
                    mask = masks.get(name.removeprefix("base.").removesuffix(".weight"))
                    assert torch.equal(tensor, first[name] if mask is None else first[name] * mask), name
            checked.append(step)

    tiny.by_hand(method, 4, watch)
    assert checked == [0, 1, 2, 3, 4]
    assert [phase.name for phase in method.phases()] == ["untouched", "mlm_head", "search", "finetune"]


@pytest.mark.parametrize(("objective", "phases"), [("kd", ["search", "finetune"])])
def test_only_masked_language_modelling_needs_a_head(objective: str, phases: list[str]) -> None:
    method = tiny.build("tamt", objective=objective, train_mlm_head=0)
    assert [phase.name for phase in method.phases()] == phases
    assert not method.module.extra
    for name in ("mlm", "mlm+kd"):
        with pytest.raises(UserError, match=r"train_mlm_head 0.*masked-LM head.*expected"):
            tiny.build("tamt", objective=name, train_mlm_head=0)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> tiny.Workshop:
    """With a file of text in the tiny model's words."""
    made = tiny.Workshop(tmp_path_factory.mktemp("workshop"))
    lines = [" ".join(tiny.WORDS[5 + (row * 7 + place * place) % 16] for place in range(12)) for row in range(60)]
    (made.folder / "text.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return made


def run(workshop: tiny.Workshop, *words: str, steps: int = 3) -> tiny.Outcome:
    text = () if "--mask" in words else ("--text", str(workshop.folder / "text.txt"))
    return workshop.run("tamt", *(() if "--mask" in words else QUICK), *text, *words, steps=steps)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_run_saves_mask_weights_and_what_the_text_says(workshop: tiny.Workshop, objective: str, capsys: Any) -> None:
    outcome = run(workshop, "--objective", objective, "--sparsity", "0.7")
    outcome.check_zeros()
    pruned = [int((~mask).sum()) for mask in outcome.masks.values()]
    assert pruned == [units_to_prune(0.7, mask.numel()) for mask in outcome.masks.values()]
    assert "embeddings.word_embeddings" in outcome.masks and "pooler.dense" not in outcome.masks
    phases = {phase["phase"]: phase for phase in outcome.result["phases"]}
    search, mlm = phases["search"], "mlm" in objective
    assert list(phases) == [*(["mlm_head"] if mlm else []), "search", "finetune"]
    assert (search["steps"], phases["finetune"]["steps"]) == (4, 3)
    assert search["kd_loss"] > 0 and 0 < search["stayed"] <= 1
    assert ("mlm_loss" in search, "dense_mlm_loss" in search) == (mlm, mlm)
    assert ("the checkpoint has no masked-LM head" in capsys.readouterr().out) == mlm
    if mlm:
        assert phases["mlm_head"]["new_mlm_head"] is True
        # The very head and the very blocks.
        assert phases["mlm_head"]["mlm_loss"] == pytest.approx(search["dense_mlm_loss"])
    assert outcome.result["text"]["block_length"] == 10


def test_a_checkpoints_own_head_is_used(workshop: tiny.Workshop, tmp_path: Path) -> None:
    shutil.copytree(workshop.model, tmp_path / "with")
    torch.manual_seed(0)
    AutoModelForMaskedLM.from_config(tiny.config()).save_pretrained(tmp_path / "with")
    outcome = run(workshop, "--model", str(tmp_path / "with"), "--train-mlm-head", "0")
    assert [phase["phase"] for phase in outcome.result["phases"]] == ["search", "finetune"]


RECIPE = ("--save-strategy", "steps", "--save-steps", "2", "--objective", "mlm+kd", "--sparsity", "0.6", "--untouched")


def test_resumed_anywhere_it_is_the_same_run(workshop: tiny.Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    breaks = Breaks(monkeypatch)
    straight = run(workshop, *RECIPE, steps=3).folder
    command = workshop.command("tamt", *QUICK, "--text", str(workshop.folder / "text.txt"), *RECIPE, steps=3)
    resume = ["--resume", str(workshop.folder / f"run{workshop.runs}")]
    breaks.signal_at("mlm_head", 1, signal.SIGTERM)
    assert main(command) == 128 + signal.SIGTERM
    breaks.signal_at("search", 1)
    assert main(resume) == 130
    breaks.cut_at("search", 4)
    with pytest.raises(PowerCut):
        main(resume)
    breaks.signal_at("search", 4)
    assert main(resume) == 130
    breaks.signal_at("finetune", 2)
    assert main(resume) == 130
    assert main(resume) == 0
    assert_same(straight, Path(resume[1]))


def test_a_mask_serves_another_run(workshop: tiny.Workshop) -> None:
    found = run(workshop, "--objective", "kd", "--sparsity", "0.7", "--allocation", "global")
    again = run(workshop, "--mask", str(found.folder), "--seed", "7", "--no-untouched")
    assert all(torch.equal(again.masks[name], mask) for name, mask in found.masks.items())
    assert [phase["phase"] for phase in again.result["phases"]] == ["finetune"]
    assert again.result["phases"][0]["mask"] | {"sha256": ""} == {
        "run": str(found.folder), "sha256": "", "method": "tamt", "task": "custom",
    }  # fmt: skip
    assert again.result["sparsity"]["target"] == 0.7
    again.check_zeros()
    assert run(workshop, "--mask", str(found.folder), "--sparsity", "0.7").result["sparsity"]["target"] == 0.7


@pytest.mark.parametrize("pattern", ["2:4", "block:4x4", "neurons", "heads"])
def test_a_mask_of_any_method_and_pattern_serves(workshop: tiny.Workshop, pattern: str) -> None:
    words = ("--pattern", pattern, "--masked", "encoder", "--no-untouched")
    found = workshop.run("magnitude", *words, steps=1)
    again = run(workshop, *words, "--mask", str(found.folder))
    assert again.masks.keys() == found.masks.keys()
    assert all(torch.equal(again.masks[name], mask) for name, mask in found.masks.items())


def test_masks_that_do_not_fit_are_refused_by_name(workshop: tiny.Workshop, tmp_path: Path, capsys: Any) -> None:
    mine = str(workshop.run("magnitude", "--no-untouched", "--sparsity", "0.4", steps=1).folder)
    dense = str(workshop.run("finetune", steps=1).folder)
    other = str(tiny.save_checkpoint(tmp_path / "other", seed=5))
    wrong: list[tuple[tuple[str, ...], str]] = [
        (("--mask", mine), "--masked encoder"),
        (("--mask", mine, "--masked", "encoder", "pooler"), "masks encoder, this run encoder pooler"),
        (("--mask", mine, "--masked", "encoder", "--pattern", "2:4"), "--pattern unstructured"),
        (("--mask", mine, "--masked", "encoder", "--sparsity", "0.5"), "--sparsity asks for 0.5"),
        (("--mask", mine, "--masked", "encoder", "--model", other), "another base"),
        (("--mask", mine, "--masked", "encoder", "--text", str(workshop.folder / "text.txt")), "text"),
        (("--mask", dense), "pruned nothing"),
        (("--mask", str(tmp_path)), "no model/masks.safetensors"),
    ]
    capsys.readouterr()
    for words, named in wrong:
        assert main(workshop.command("tamt", *words)) == 2, words
        error = capsys.readouterr().err
        assert error.startswith("error: ") and named in error, error
        assert not (workshop.folder / f"run{workshop.runs}").exists()


def test_a_mask_with_units_in_part_is_refused(workshop: tiny.Workshop, capsys: Any) -> None:
    """A file that says blocks and holds single weights."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    folder = workshop.run("magnitude", "--no-untouched", "--pattern", "block:4x4", steps=1).folder
    file = folder / "model" / "masks.safetensors"
    with safe_open(file, framework="pt") as opened:
        about = opened.metadata()
    bits = load_file(file)
    bits["encoder.layer.0.output.dense"][0] ^= 1
    save_file(bits, file, about)
    assert json.loads(about["sparsebert"])["pattern"] == "block:4x4"
    words = ("--mask", str(folder), "--masked", "encoder", "--pattern", "block:4x4")
    assert main(workshop.command("tamt", *words)) == 2
    assert "encoder.layer.0.output.dense: units of its pattern are pruned in part" in capsys.readouterr().err


def test_a_search_without_text_is_refused(workshop: tiny.Workshop, capsys: Any) -> None:
    assert main(workshop.command("tamt", "--search-steps", "2")) == 2
    assert "give --text FILE or FOLDER" in capsys.readouterr().err


def test_half_of_the_blocks_are_pairs_by_their_tokens_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 1000, (2000, 12), generator=generator)
    ids[:, 0], ids[:, -1] = 2, 3
    batch = {"input_ids": ids, "token_type_ids": torch.zeros_like(ids), "labels": ids.clone()}
    changed = two_segments(batch)
    again = two_segments({name: tensor.flip(0) for name, tensor in batch.items()})
    assert all(torch.equal(changed[name], again[name].flip(0)) for name in batch)
    new, types = changed["input_ids"], changed["token_type_ids"]
    cut = new != ids
    assert set(cut.sum(1).tolist()) == {0, 1} and 0.45 < float(cut.any(1).float().mean()) < 0.55
    assert cut.any(0).tolist() == [False, *[True] * 10, False]
    assert bool((new[cut] == 3).all()) and bool((changed["labels"][cut] == -100).all())
    assert torch.equal(changed["labels"] == -100, cut)
    # First all of the one type, then all of the other, from behind the new [SEP].
    assert torch.equal(types, (cut.cumsum(1) - cut.long()))


@pytest.mark.parametrize(("kind", "shown"), [("bert", {0, 1}), ("roberta", set()), ("distilbert", set())])
def test_only_a_bert_is_shown_pairs(kind: str, shown: set[int]) -> None:
    method = tiny.build("tamt", objective="kd", kind=kind)
    phase = method.phases()[0]
    phase.start()
    seen: set[int] = set()
    encode = method.context.model.encode

    def watched(ids: Tensor, mask: Any = None, types: Tensor | None = None, **extra: Any) -> Any:
        seen.update([] if types is None else types.unique().tolist())
        return encode(ids, mask, types, **extra)

    method.context.model.encode = watched  # type: ignore[method-assign]
    method.module.train()
    method.module(**tiny.batch(phase, 64))
    assert seen == shown
