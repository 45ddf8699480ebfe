"""Part `kernels`: masks, layers under masks and layers over stored weights (performance.md G1 to G16);
what stands between two layers."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.gpu import cells_clusters, cells_ffn, cells_masked, cells_norm, cells_residue, cells_stored
from benchmarks.gpu.bench import Bench, Cell
from benchmarks.gpu.inputs import FFN, LAYER, SQUARE
from benchmarks.gpu.rows import Target

__all__ = ["cells"]

BF16, FP32, FP16 = torch.bfloat16, torch.float32, torch.float16
BLOCKS, BITMAP, TWO_FOUR = ("block_sparse_linear",), ("bitmap_linear",), ("semi_structured_linear",)
MASKED = ("select_mask",)
TINY: dict[str, Any] = {"shape": (32, 64), "rows": 8}


def cells(bench: Bench) -> list[Cell]:
    """One cell of each goal first, then the rest of the grids."""
    ranked = [_blocks(), _masked(), _two_four(), _bitmap(), _fused(), _others()]
    found = []
    for place in range(max(map(len, ranked))):
        found += [cells[place] for cells in ranked if place < len(cells)]
    return found


def _masked() -> list[Cell]:
    def step(shape: tuple[int, int], rows: int, dtype: torch.dtype = BF16) -> Cell:
        # Its products may be cuBLAS's: there is something to measure whatever kernels there are.
        return Cell("masked_linear", cells_masked.linear_step, {"shape": shape, "rows": rows, "dtype": dtype},
                    {"shape": (16, 32), "rows": 8})  # fmt: skip

    def select(shapes: tuple[tuple[int, int], ...], small: tuple[tuple[int, int], ...], dtype: torch.dtype) -> Cell:
        return Cell("select_mask", cells_masked.select, {"shapes": shapes, "dtype": dtype}, {"shapes": small}, MASKED)

    return [
        step(FFN[0], 4096),
        select((FFN[0],), ((16, 32),), BF16),
        step(FFN[0], 16384),
        select(LAYER * 12, ((8, 8), (16, 8)), BF16),
        step(SQUARE, 1024),
        step(FFN[1], 4096),
        step(FFN[0], 1024),
        Cell("masked_weight", cells_masked.weight, {"shape": FFN[0], "dtype": BF16}, {"shape": (16, 40)},
             ("masked_weight",)),
        step(SQUARE, 4096),
        step(SQUARE, 16384),
        step(FFN[0], 128),
        step(FFN[0], 65536),
        select((SQUARE,), ((16, 32),), FP32),
        step(FFN[0], 4096, FP32),
    ]  # fmt: skip


def _blocks() -> list[Cell]:
    def layer(block: int, shape: tuple[int, int], rows: int, sparsity: float, *targets: Target, **more: Any) -> Cell:
        settings = {"spelling": f"blocks:{block}x{block}", "pattern": f"{block}x{block}", "shape": shape, "rows": rows}
        return Cell("block_sparse_linear", cells_stored.layer,
                    {**settings, "sparsity": sparsity, "targets": targets, **more},
                    {"spelling": "blocks:16x16", "pattern": "16x16", **TINY, "sparsity": 0.5}, BLOCKS)  # fmt: skip

    def backward(block: int, shape: tuple[int, int], rows: int, sparsity: float) -> Cell:
        return Cell("block_sparse_linear, backward", cells_stored.backward,
                    {"block": block, "shape": shape, "rows": rows, "sparsity": sparsity},
                    {"block": 16, **TINY, "sparsity": 0.5}, (*BLOCKS, "block_sparse_sddmm"))  # fmt: skip

    def clusters(block: int, shape: tuple[int, int], rows: int, sparsity: float, **more: Any) -> Cell:
        return Cell("block_cluster_linear", cells_clusters.clusters,
                    {"block": block, "shape": shape, "rows": rows, "sparsity": sparsity, **more},
                    {"shape": (128, 128), "rows": 8, "sparsity": 0.5}, ("block_cluster_linear",))  # fmt: skip

    g5 = Target("G5", "faster", {"H100": 1.8, "H200": 2.3})
    even = Target("G8", "faster", 1.25)
    found = [
        layer(64, FFN[0], 16384, 0.75, g5),
        layer(64, FFN[0], 4096, 0.75, Target("G6", "faster", 2.2), state="warm"),
        backward(64, FFN[0], 16384, 0.75),
        layer(64, FFN[1], 16384, 0.75, g5),
        clusters(64, FFN[1], 16384, 0.75),
        layer(64, FFN[1], 16384, 0.5, even),
        layer(64, FFN[0], 4096, 0.9, Target("G6", "faster", 2.6), state="warm"),
        layer(128, (4096, 4096), 8192, 0.75, Target("G7", "faster", 3.0)),
        clusters(64, FFN[1], 16384, 0.5),
        clusters(64, FFN[0], 16384, 0.75, activation="gelu"),
        clusters(128, (4096, 4096), 8192, 0.75),
        layer(64, FFN[0], 4096, 0.5, even),
        layer(64, FFN[0], 4096, 0.35, Target("G8", "faster", 1.0)),
        layer(64, FFN[0], 2048, 0.75, Target("G6", "faster", 2.2), state="warm"),
        layer(32, FFN[0], 4096, 0.75),
        layer(64, FFN[0], 16384, 0.75, activation="gelu"),
        layer(64, SQUARE, 4096, 0.75),
        backward(64, FFN[1], 4096, 0.75),
        layer(16, FFN[0], 4096, 0.9),
        layer(64, FFN[0], 1024, 0.5, even),
        layer(64, FFN[0], 16384, 0.5, even),
        layer(64, SQUARE, 16384, 0.5, even),
        layer(64, FFN[0], 128, 0.75),
        layer(64, FFN[0], 65536, 0.75),
        layer(128, FFN[0], 16384, 0.75),
        layer(64, FFN[0], 16384, 0.25),
        layer(64, FFN[0], 16384, 0.9),
        layer(64, FFN[0], 4096, 0.75, dtype=FP32),
        layer(64, FFN[0], 4096, 0.75, dtype=FP16),
    ]
    return found


def _two_four() -> list[Cell]:
    def layer(shape: tuple[int, int], rows: int, activation: str, least: float) -> Cell:
        targets = (
            Target("G11", "faster", least, ("cuBLAS", "compiled", "cuBLASLt")),
            Target("G12", "faster", 1.3, ("torch 2:4", "cuSPARSELt, searched")),
        )
        return Cell("semi_structured_linear", cells_stored.two_four,
                    {"shape": shape, "rows": rows, "activation": activation, "targets": targets},
                    {**TINY}, TWO_FOUR)  # fmt: skip

    return [
        layer(FFN[0], 4096, "gelu", 1.2),
        layer(FFN[0], 16384, "gelu", 1.35),
        layer(SQUARE, 4096, "none", 1.1),
        layer(FFN[1], 16384, "none", 1.35),
        layer(FFN[0], 16384, "gelu_tanh", 1.35),
        layer(FFN[0], 1024, "none", 1.0),
        layer(FFN[0], 128, "none", 1.0),
        layer(SQUARE, 16384, "none", 1.1),
        layer(FFN[0], 65536, "gelu", 1.35),
    ]


def _bitmap() -> list[Cell]:
    least = {0.5: 1.15, 0.7: 1.5, 0.8: 1.8, 0.9: 2.2}

    def encoder(rows: int, sparsity: float) -> Cell:
        return Cell("bitmap_linear, encoder", cells_stored.encoder,
                    {"spelling": "bitmap", "pattern": "unstructured", "rows": rows, "sparsity": sparsity,
                     "targets": (Target("G13", "faster", least[sparsity]),)},
                    {"rows": 4, "layers": 1, "shapes": ((32, 64), (64, 32))}, BITMAP)  # fmt: skip

    def layer(shape: tuple[int, int], rows: int, sparsity: float, *targets: Target) -> Cell:
        return Cell("bitmap_linear", cells_stored.layer,
                    {"spelling": "bitmap", "pattern": "unstructured", "shape": shape, "rows": rows,
                     "sparsity": sparsity, "computed": 1.0, "targets": targets},
                    {**TINY, "sparsity": 0.5}, BITMAP)  # fmt: skip

    dense = Target("G14", "faster", 0.9)
    residue = Target("G15", "faster", 1.15)

    def unstructured(shape: tuple[int, int], rows: int, sparsity: float, activation: str = "none") -> Cell:
        return Cell("semi_structured_packed_linear, residue", cells_residue.residue,
                    {"shape": shape, "rows": rows, "sparsity": sparsity, "activation": activation,
                     "targets": (residue,)},
                    {**TINY, "sparsity": 0.5}, ("semi_structured_packed_linear",))  # fmt: skip

    return [
        encoder(16, 0.8),
        layer(FFN[0], 1024, 0.8, dense),
        encoder(32, 0.8),
        Cell("bitmap_linear, bytes", cells_stored.stored_bytes,
             {"spelling": "bitmap", "pattern": "unstructured", "shape": FFN[0], "sparsity": 0.8}, {"shape": (128, 256)},
             BITMAP),
        unstructured(FFN[0], 4096, 0.9),
        encoder(16, 0.9),
        encoder(16, 0.5),
        encoder(16, 0.7),
        unstructured(FFN[0], 4096, 0.95),
        layer(FFN[0], 4096, 0.9, dense),
        layer(FFN[0], 16384, 0.8, dense),
        encoder(32, 0.5),
        encoder(32, 0.7),
        encoder(32, 0.9),
        layer(FFN[0], 1, 0.8),
        unstructured(FFN[0], 16384, 0.9),
        unstructured(FFN[1], 16384, 0.95),
        unstructured(FFN[0], 16384, 0.95, "gelu"),
    ]  # fmt: skip


def _fused() -> list[Cell]:
    def ffn(rows: int, sparsity: float, *targets: Target) -> Cell:
        return Cell("block_sparse_ffn", cells_ffn.ffn,
                    {"rows": rows, "sparsity": sparsity, "width": 768, "neurons": 3072, "block": 64,
                     "targets": targets},
                    {"rows": 16, "sparsity": 0.5, "width": 32, "neurons": 64, "block": 16},
                    ("block_sparse_ffn",), 240.0)  # fmt: skip

    return [
        ffn(16384, 0.75, Target("G9", "faster", 2.4, ("compiled dense", "eager dense"))),
        ffn(16384, 0.9, Target("G9", "faster", 3.2, ("compiled dense", "eager dense"))),
        ffn(4096, 0.75),
        ffn(16384, 0.5),
        ffn(1024, 0.75),
    ]


def _others() -> list[Cell]:
    def chosen(pattern: str, shape: tuple[int, int], rows: int, sparsity: float) -> Cell:
        return Cell("SparseLinear, auto", cells_stored.chosen,
                    {"pattern": pattern, "shape": shape, "rows": rows, "sparsity": sparsity},
                    {**TINY, "sparsity": 0.5, **({"pattern": "16x16"} if "x" in pattern else {})})  # fmt: skip

    def structured(heads: int, neurons: int) -> Cell:
        return Cell("heads and neurons gone", cells_stored.structured,
                    {"rows": 16384, "heads": heads, "neurons": neurons},
                    {"rows": 8, "heads": 2, "neurons": 64, "width": 64, "whole": 4})  # fmt: skip

    def norm(rows: int, width: int = 768, dtype: torch.dtype = BF16) -> Cell:
        return Cell("add_layer_norm", cells_norm.add_norm, {"rows": rows, "width": width, "dtype": dtype},
                    {"rows": 5, "width": 24}, ("add_layer_norm",))  # fmt: skip

    return [
        structured(5, 1216),
        chosen("64x64", FFN[0], 4096, 0.75),
        norm(16384),
        chosen("unstructured", FFN[0], 4096, 0.8),
        structured(2, 128),
        chosen("2:4", FFN[0], 4096, 0.5),
        chosen("unstructured", FFN[0], 16, 0.8),
        chosen("64x64", SQUARE, 1024, 0.5),
        norm(128),
        norm(16384, 1024),
        norm(4096),
        norm(16384, dtype=FP32),
    ]
