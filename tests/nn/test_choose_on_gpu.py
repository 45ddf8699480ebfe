"""What choosing does on a GPU, with torch.cuda's part played by fakes: there need not be one."""

from __future__ import annotations

import contextlib
import importlib
import math
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsebert.errors import UserError
from sparsebert.formats import Blocks, TwoFour
from sparsebert.nn import choose, gpu_timer, remember
from sparsebert.nn import measure_captured as public
from sparsebert.nn.choose import DENSE_PATHS, GPU_ROWS, _no_gpu_kernel
from sparsebert.nn.structure import Structure, structure_of
from sparsebert.ops._backend import OPS

# The package has a function of that name.
choosing = importlib.import_module("sparsebert.nn.choose")


class Clock:
    """A GPU whose work is done at once: events read the time that calls have taken so far."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.order = 0.0, ""
        clock = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = clock.now

            def elapsed_time(self, other: Any) -> float:
                return 1e3 * (other.at - self.at)

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    def call(self, name: str, seconds: float) -> Callable[[], None]:
        def call() -> None:
            self.now += seconds
            self.order += name

        return call


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_events_time_bursts_in_turns(clock: Clock) -> None:
    found = gpu_timer.measure_events(
        {"a": clock.call("a", 2e-6), "b": clock.call("b", 3e-6), "c": clock.call("c", 1.0)}
    )
    assert found == pytest.approx({"a": 2e-6, "b": 3e-6, "c": 1.0})
    # The hopeless one is not asked again, the others follow each other by turns.
    burst = gpu_timer.BURST
    assert clock.order.count("c") < 3 * burst and "a" * burst + "b" * burst + "b" * burst + "a" * burst in clock.order


def test_a_call_that_cannot_be_captured_is_infinitely_slow(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    def captured(call: Callable[[], object]) -> Callable[[], object]:
        call()
        return lambda: [call() for _ in range(gpu_timer.BURST)]

    def fails() -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(gpu_timer, "_captured", captured)
    assert public({"a": clock.call("a", 1e-6), "b": fails}) == pytest.approx({"a": 1e-6, "b": math.inf})
    assert public({"b": fails}) == {"b": math.inf}


def test_what_the_timer_could_not_time_is_left_out() -> None:
    def timer(calls: Mapping[str, object]) -> dict[str, float]:
        return {name: 1.0 if name in DENSE_PATHS else math.inf for name in calls}

    found = choose(torch.eye(64), rows=(4, 8), timer=timer)
    assert found.format == "dense" and set(found.seconds) == set(DENSE_PATHS)
    assert found.left_out["unstructured"] == "the timer could not time it"
    assert choose(torch.eye(64), rows=(4, 8), timer=timer).remembered


class OnGpu(Tensor):
    """A tensor that says it is on a GPU."""

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True


def test_nothing_is_measured_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    found = choose(torch.eye(64).as_subclass(OnGpu))
    assert found.format == "dense" and found.rows == GPU_ROWS and found.speedup == 1.0 and found.dense == ()
    assert found.fastest == "unstructured" and found.reason.startswith("nothing was measured: a CUDA graph")
    assert str(found).split() == ["format", "2048", "rows", "16384", "rows"]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with pytest.raises(TypeError, match="plain tensor"):
        choose(torch.eye(64).as_subclass(OnGpu))


def test_candidates_are_what_a_gpu_has_kernels_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Structure, "on_gpu", True)
    mask = torch.eye(4, dtype=torch.bool).repeat_interleave(128, 0).repeat_interleave(128, 1)
    found = structure_of(mask.bfloat16()).candidates(torch.bfloat16, False)[0]
    assert {name for name in found if name.startswith("blocks")} == {f"blocks:{s}x{s}" for s in (16, 32, 64, 128)}
    two_four = torch.tensor([True, False, False, True]).repeat(64, 16)
    found = structure_of(two_four.float()).candidates(torch.float32, False)[0]
    assert [name for name in found if "semi" in name] == ["semi_structured:2:4"]
    one_four = torch.tensor([True, False, False, False]).repeat(64, 16)
    assert not any("semi" in name for name in structure_of(one_four.float()).candidates(torch.float32, False)[0])


def test_on_hopper_a_sparse_weight_may_be_two_four_and_a_residue(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Structure, "on_gpu", True)

    def found(mask: Tensor, dtype: torch.dtype = torch.bfloat16) -> tuple[dict[str, int], dict[str, str]]:
        return structure_of(mask.to(dtype)).candidates(dtype, False)

    mask = torch.rand(256, 512, generator=torch.Generator().manual_seed(0)) < 0.1
    assert "two_four" not in found(mask)[0]
    monkeypatch.setattr(Structure, "on_hopper", True)
    assert found(mask)[0]["two_four"] == TwoFour.from_dense(mask.bfloat16()).nnz
    assert "two_four" not in structure_of(mask.bfloat16()).candidates(torch.bfloat16, True)[0]
    for unfit in (mask.float(), mask[:254].bfloat16(), mask[:, :508].bfloat16()):
        assert "two_four" not in found(unfit != 0, unfit.dtype)[0]
    half = torch.rand(256, 512) < 0.5
    assert "% of its places have a weight that does not fit into 2:4" in found(half)[1]["two_four"]
    # A 2:4 weight has a format of its own; one of eight leaves nothing over, and fits the units too.
    assert "two_four" not in found(torch.tensor([True, False, False, True]).repeat(64, 16))[0]
    assert found(torch.eye(8, dtype=torch.bool).repeat(8, 8))[0]["two_four"] == 64 * 64 // 2


def test_a_format_without_a_gpu_kernel_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(kind: str, supported: bool) -> object:
        raise UserError("SPARSEBERT_BACKEND=cpu: no")

    weight: Any = SimpleNamespace(is_cuda=True)
    for choose_, why in (
        (lambda *_: SimpleNamespace(namespace="sparsebert_reference"), "it has no GPU kernel here"),
        (lambda *_: SimpleNamespace(namespace="sparsebert_triton"), None),
        (refused, "SPARSEBERT_BACKEND=cpu: no"),
    ):
        monkeypatch.setitem(OPS, "block_sparse_linear", SimpleNamespace(choose=choose_))
        assert _no_gpu_kernel(Blocks, weight) == why
        assert _no_gpu_kernel(Blocks, torch.ones(1)) is None


def test_a_choice_is_of_one_kind_of_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    found = remember.machine(torch.device("cuda"))
    assert (found["gpu"], found["capability"], found["device"]) == ("NVIDIA H100", [9, 0], "cuda")
    assert {"torch", "triton", "cuda", "sparsebert", "extension"} <= set(found) and "threads" not in found
    assert "gpu" not in remember.machine(torch.device("cpu"))


@pytest.fixture
def op(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """An op's body that fails for 3 rows, as registered, and what it makes of a call."""
    from sparsebert.ops import _backend

    def body(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
        if activation == "relu":
            raise ValueError("activation: not today")
        if len(x) == 3:
            raise RuntimeError("out of resource: shared memory\nand more")
        return torch.full((len(x), len(weight)), 7.0)

    monkeypatch.delenv("SPARSEBERT_BACKEND", raising=False)
    monkeypatch.setattr(_backend, "_failed", {})
    yield _backend.or_else("dense_linear", body, torch.ops.sparsebert_reference.dense_linear)


def test_a_kernel_that_fails_falls_back_with_one_warning(op: Callable[..., Any]) -> None:
    x, weight = torch.ones(3, 4), torch.ones(2, 4)
    with pytest.warns(
        RuntimeWarning, match=r"dense_linear: its Triton kernel .*\(out of resource: shared memory\)"
    ) as w:
        for _ in range(2):
            assert torch.equal(op(x, weight, None, "none"), torch.full((3, 2), 4.0))
        assert torch.equal(op(x, weight[:1], None, "none"), torch.full((3, 1), 4.0))
    assert len(w) == 1
    # Other calls have their kernel, and a wrong argument is no kernel's fault.
    assert torch.equal(op(x[:2], weight, None, "none"), torch.full((2, 2), 7.0))
    with pytest.raises(ValueError, match="not today"):
        op(x, weight, None, "relu")


def test_a_candidate_whose_kernel_does_not_build_is_left_out() -> None:
    """Triton's errors are no RuntimeErrors; an error of another kind is no candidate's fault."""
    triton = pytest.importorskip("triton")

    def too_large() -> None:
        raise triton.runtime.errors.OutOfResources(300_000, 232_448, "shared memory")

    def other() -> None:
        raise KeyError("rows")

    assert "out of resource: shared memory" in str(choosing._trial(too_large, False))
    with pytest.raises(KeyError):
        choosing._trial(other, False)


def test_what_is_measured_runs_on_the_weights_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[torch.device] = []

    @contextlib.contextmanager
    def current(device: torch.device) -> Iterator[None]:
        entered.append(device)
        yield

    monkeypatch.setattr(torch.cuda, "device", current)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    for device in (torch.device("cuda", 1), torch.device("cpu")):
        with choosing._plain_torch(device, True):
            assert torch.is_grad_enabled()
    assert entered == [torch.device("cuda", 1)]


def test_where_it_was_forced_it_raises(op: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsebert.ops._backend import failures_raise

    x, weight = torch.ones(3, 4), torch.ones(2, 4)
    with failures_raise(), pytest.raises(RuntimeError, match="shared memory"):
        op(x, weight, None, "none")
    with pytest.warns(RuntimeWarning):
        op(x, weight, None, "none")
    monkeypatch.setenv("SPARSEBERT_BACKEND", "triton")
    with pytest.raises(RuntimeError, match="shared memory"):
        op(x, weight, None, "none")
