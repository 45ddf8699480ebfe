"""Fixtures of the ops' tests: the instruction sets there are, the backends there are, and the error budget."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from sparsebert import _load

ISAS = ("avx512_bf16", "avx512", "avx2", "generic")
_AVX512 = ("avx512f", "avx512bw", "avx512vl", "avx512dq")
_WANTED = {"avx512_bf16": (*_AVX512, "avx512_bf16"), "avx512": _AVX512, "avx2": ("avx2", "fma"), "generic": ()}


def _needs(isa: str) -> str | None:
    """Why the compiled kernels cannot run with `isa` here, or None."""
    reason = _load.missing("cpu")
    if reason is not None:
        return f"no compiled CPU kernels: {reason}"
    host = _load.host()
    if host is None:
        return "the host module was not built"
    features = host.cpu_features()
    absent = [name for name in _WANTED[isa] if not features[name]]
    return f"this CPU has no {', '.join(absent)}" if absent else None


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each instruction set in turn, in force for the test."""
    reason = _needs(request.param)
    if reason is not None:
        pytest.skip(reason)
    monkeypatch.setenv("SPARSEBERT_ISA", request.param)
    return str(request.param)


@pytest.fixture(params=["cpu", "reference"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each backend of this machine in turn, forced for the test."""
    if request.param == "cpu" and _load.missing("cpu") is not None:
        pytest.skip(f"no compiled CPU kernels: {_load.missing('cpu')}")
    monkeypatch.setenv("SPARSEBERT_BACKEND", request.param)
    return str(request.param)


@pytest.fixture
def within() -> Callable[..., None]:
    """Assert that a result is about as close to the exact one as torch's own at the same dtype.

    With `tiny` one rounding is allowed too: among a handful of numbers torch's own error can be 0 by chance.
    """

    def check(result: Tensor, usual: Tensor, exact: Tensor, factor: float, tiny: bool = False) -> None:
        assert exact.dtype == torch.float64 and result.shape == exact.shape
        if exact.numel() == 0:
            return
        largest = exact.abs().max()
        error, allowed = (result.double() - exact).abs().max(), (usual.double() - exact).abs().max()
        slack = max(1e-6, torch.finfo(usual.dtype).eps) if tiny else 1e-6
        assert error <= factor * allowed + slack * largest, f"error {error}, torch's own {allowed}, largest {largest}"

    return check


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Set torch's number of threads; undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
