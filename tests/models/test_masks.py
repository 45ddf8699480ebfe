"""The file of masks by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from sparsebert.errors import UserError
from sparsebert.models.masks import pack_masks, read_masks
from sparsebert.patterns.matrix import Matrix


@settings(deadline=None, max_examples=40)
@given(rows=st.integers(1, 9), columns=st.integers(1, 9), density=st.sampled_from([0.0, 0.3, 1.0]))
def test_masks_of_any_shape_come_back(rows: int, columns: int, density: float, tmp_path_factory: Any) -> None:
    path = tmp_path_factory.mktemp("masks") / "masks.safetensors"
    matrix = Matrix("x", (rows, columns), "query", 0, 1)
    mask = torch.rand(rows, columns, generator=torch.Generator().manual_seed(rows * columns)) < density
    path.write_bytes(pack_masks({"x": mask}, "unstructured", "f" * 64))
    masks, pattern, fingerprint = read_masks(path, {"x": matrix})
    assert torch.equal(masks["x"], mask) and (pattern, fingerprint) == ("unstructured", "f" * 64)


def test_bits_past_the_last_weight(tmp_path: Path) -> None:
    path = tmp_path / "masks.safetensors"
    matrix = Matrix("x", (3, 3), "query", 0, 1)
    path.write_bytes(pack_masks({"x": torch.ones(3, 3, dtype=torch.bool)}, "unstructured", ""))
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    for last, accepted in ((1, True), (3, False), (0, True), (128, False)):
        save_file({"x": torch.tensor([255, last], dtype=torch.uint8)}, path, metadata=metadata)
        if accepted:
            assert read_masks(path, {"x": matrix})[0]["x"][2, 2] == bool(last)
            continue
        with pytest.raises(UserError, match="x: the bits past the last weight are not 0"):
            read_masks(path, {"x": matrix})


def test_files_that_hold_no_masks(tmp_path: Path) -> None:
    path = tmp_path / "masks.safetensors"
    with pytest.raises(UserError, match=r"masks\.safetensors: truncated, damaged or missing"):
        read_masks(path, {})
    for metadata in (None, {"format": "pt"}, {"sparsebert": "{"}, {"sparsebert": "3"}):
        save_file({"x": torch.zeros(1)}, path, metadata=metadata)
        with pytest.raises(UserError, match="not a file of masks"):
            read_masks(path, {})
