"""What a user can write for a pattern, and what each says about the matrices it fits."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from sparsebert.errors import UserError
from sparsebert.patterns import Matrix, parse_pattern

SPELLINGS = ("unstructured", "2:4", "1:4", "4:8", "1:2", "1:3", "31:32", "block:4x4", "block:1x8", "neurons", "heads")


def layer(index: int | None, width: int = 16, neurons: int = 32, heads: int = 4) -> list[Matrix]:
    """The six linears of an encoder layer."""
    attention = ("query", "key", "value", "attention_output")
    linears = [Matrix(f"{index}.{name}", (width, width), name, index, heads) for name in attention]
    return [
        *linears,
        Matrix(f"{index}.ffn_in", (neurons, width), "ffn_in", index),
        Matrix(f"{index}.ffn_out", (width, neurons), "ffn_out", index),
    ]


TABLE = Matrix("embeddings.word_embeddings", (40, 16), "word_embeddings")


def without(matrices: Sequence[Matrix], *components: str) -> list[Matrix]:
    return [matrix for matrix in matrices if matrix.component not in components]


@pytest.mark.parametrize("spec", SPELLINGS)
def test_a_pattern_is_named_as_it_was_written(spec: str) -> None:
    assert parse_pattern(spec).spec == spec


@pytest.mark.parametrize("spec", SPELLINGS)
def test_every_pattern_has_a_default_sparsity_that_it_can_have(spec: str) -> None:
    pattern = parse_pattern(spec)
    pattern.check_sparsity(pattern.default_sparsity)


@pytest.mark.parametrize(
    ("spec", "sparsity"), [("2:4", 0.5), ("1:4", 0.75), ("4:8", 0.5), ("1:3", 2 / 3), ("2:3", 1 / 3)]
)
def test_n_of_m_says_its_sparsity_itself(spec: str, sparsity: float) -> None:
    assert parse_pattern(spec).default_sparsity == sparsity


@pytest.mark.parametrize(
    ("word", "nearest"),
    [("unstructed", "unstructured"), ("Unstructured", "unstructured"), ("neuron", "neurons"), ("head", "heads"),
     ("block4x4", "block:RxC"), ("block:4", "block:RxC"), ("block:4X4", "block:RxC"), ("2-4", "2:4"), ("2:4 ", "2:4")],
)  # fmt: skip
def test_an_unknown_spelling_names_the_nearest_and_all_known(word: str, nearest: str) -> None:
    with pytest.raises(UserError) as error:
        parse_pattern(word)
    message = str(error.value)
    assert repr(word) in message
    assert f"did you mean {nearest!r}" in message
    for known in ("unstructured", "2:4", "n:m", "block:RxC", "neurons", "heads"):
        assert known in message


@pytest.mark.parametrize("word", ["", "zzz", "50%", "block:", "2:4:8", "-2:4", "2.5:4"])
def test_words_far_from_any_spelling_are_refused(word: str) -> None:
    with pytest.raises(UserError, match="unknown pattern"):
        parse_pattern(word)


@pytest.mark.parametrize("word", ["n:m", "block:RxC"])
def test_the_letters_of_the_help_text_ask_for_numbers(word: str) -> None:
    with pytest.raises(UserError, match="expected numbers"):
        parse_pattern(word)


@pytest.mark.parametrize("word", ["0:4", "4:4", "5:4", "2:33", "0:0", "block:0x4", "block:4x0"])
def test_numbers_that_make_no_pattern_are_refused(word: str) -> None:
    with pytest.raises(UserError, match=word):
        parse_pattern(word)


@pytest.mark.parametrize("spec", SPELLINGS)
@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, 50.0, float("nan"), float("inf"), -float("inf")])
def test_a_sparsity_outside_of_0_to_1_is_refused(spec: str, sparsity: float) -> None:
    with pytest.raises(UserError, match="sparsity"):
        parse_pattern(spec).check_sparsity(sparsity)


@pytest.mark.parametrize("sparsity", [0.0, 0.4, 0.49, 0.51, 0.75])
def test_2_4_with_another_sparsity_is_refused_and_names_its_own(sparsity: float) -> None:
    with pytest.raises(UserError, match=r"2:4 .*0\.5"):
        parse_pattern("2:4").check_sparsity(sparsity)


def test_a_third_may_be_written_in_decimals() -> None:
    parse_pattern("1:3").check_sparsity(0.6666667)


@pytest.mark.parametrize("spec", ["block:5x4", "block:4x5", "block:64x1", "block:1x64", "block:3x3"])
def test_a_block_that_does_not_divide_names_block_matrix_and_shape(spec: str) -> None:
    with pytest.raises(UserError) as error:
        parse_pattern(spec).groups([Matrix("some.query", (16, 32), "query", 0, 4)])
    for word in (spec, "some.query", "16x32"):
        assert word in str(error.value)


def test_the_first_matrix_that_does_not_fit_is_named_among_many() -> None:
    with pytest.raises(UserError, match="odd"):
        parse_pattern("block:4x4").groups([*layer(0), Matrix("odd", (16, 30), "pooler"), *layer(1)])


def test_n_of_m_that_does_not_divide_the_inputs_is_refused() -> None:
    with pytest.raises(UserError, match=r"2:4.*30 inputs of odd"):
        parse_pattern("2:4").groups([Matrix("odd", (16, 30), "pooler")])
    parse_pattern("2:4").groups([Matrix("fits", (30, 16), "pooler")])


@pytest.mark.parametrize("spec", ["neurons", "heads"])
def test_structure_outside_of_the_encoder_is_refused_by_name(spec: str) -> None:
    with pytest.raises(UserError, match=rf"{spec}.*word_embeddings"):
        parse_pattern(spec).groups([TABLE, *layer(0)])


@pytest.mark.parametrize("spec", ["neurons", "heads"])
def test_structure_needs_matrices(spec: str) -> None:
    with pytest.raises(UserError, match=spec):
        parse_pattern(spec).groups([])


@pytest.mark.parametrize(
    ("spec", "missing"),
    [
        ("neurons", "ffn_in"),
        ("neurons", "ffn_out"),
        ("heads", "query"),
        ("heads", "value"),
        ("heads", "attention_output"),
    ],
)
def test_half_a_structure_is_refused_and_says_what_is_missing(spec: str, missing: str) -> None:
    with pytest.raises(UserError, match=rf"{spec}: layer 1 .*{missing}"):
        parse_pattern(spec).groups([*layer(0), *without(layer(1), missing)])


def test_structure_of_the_other_half_of_a_layer_does_not_matter() -> None:
    attention = without(layer(0), "ffn_in", "ffn_out")
    assert len(parse_pattern("heads").groups(attention)) == 1
    with pytest.raises(UserError, match="ffn_in, ffn_out"):
        parse_pattern("neurons").groups(attention)


@pytest.mark.parametrize("spec", ["unstructured", "2:4", "block:4x4", "block:8x2"])
def test_each_matrix_has_scores_of_its_own(spec: str) -> None:
    matrices = [TABLE, *layer(0), *layer(1)]
    groups = parse_pattern(spec).groups(matrices)
    assert [[view.matrix for view in group.views] for group in groups] == [[matrix] for matrix in matrices]
    block = {"block:4x4": (4, 4), "block:8x2": (8, 2)}.get(spec, (1, 1))
    for group, matrix in zip(groups, matrices, strict=True):
        expected = (matrix.shape[0] // block[0], matrix.shape[1] // block[1])
        assert group.shape == group.views[0].grid == expected
        assert group.elements == matrix.shape[0] * matrix.shape[1]


def test_a_neuron_is_a_row_of_the_first_linear_and_a_column_of_the_second() -> None:
    groups = parse_pattern("neurons").groups([*layer(3), *layer(5)])
    assert [group.shape for group in groups] == [(32,), (32,)]
    assert [[(view.matrix.component, view.grid) for view in group.views] for group in groups] == [
        [("ffn_in", (32, 1)), ("ffn_out", (1, 32))]
    ] * 2
    assert groups[0].elements == 2 * 32 * 16
    assert len({group.name for group in groups}) == 2


def test_a_head_is_rows_of_query_key_and_value_and_columns_of_the_output() -> None:
    (group,) = parse_pattern("heads").groups(layer(0))
    assert group.shape == (4,)
    assert {view.matrix.component: view.grid for view in group.views} == {
        "query": (4, 1), "key": (4, 1), "value": (4, 1), "attention_output": (1, 4),
    }  # fmt: skip
    assert group.elements == 4 * 16 * 16
