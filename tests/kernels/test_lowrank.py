import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedapt.kernels import lowrank
from fedapt.kernels.lowrank import (
    MANY,
    LowRank,
    Matrix,
    orthonormalize,
    refactor,
    refactor_reference,
    truncate_reference,
    weighted_sum,
)

dims = st.integers(1, 9)
seeds = st.integers(0, 2**32)
TOLERANCE = 1e-9  # of float64, on matrices whose entries are about 1


@st.composite
def factors(draw: st.DrawFn, outputs: int, inputs: int) -> LowRank:
    """Any rank (also above `outputs` and `inputs`); b may be zero, or of less rank than it has columns."""
    rank, kind = draw(st.integers(1, 12)), draw(st.sampled_from(["full", "full", "deficient", "zero"]))
    random = np.random.default_rng(draw(seeds))
    b, a = random.standard_normal((outputs, rank)), random.standard_normal((rank, inputs))
    if kind == "deficient":
        b = np.outer(b[:, 0], random.standard_normal(rank))
    return LowRank(b * (kind != "zero"), a)


one = st.tuples(dims, dims).flatmap(lambda shape: factors(*shape))
several = st.tuples(dims, dims).flatmap(lambda shape: st.lists(factors(*shape), min_size=1, max_size=4))
outputs_only = one.map(lambda term: term.b)
ranks = st.integers(1, 12)


def dense(term: LowRank) -> Matrix:
    return np.asarray(term.b @ term.a)


def close(left: Matrix, right: Matrix, tolerance: float = TOLERANCE) -> bool:
    return bool(np.allclose(left, right, rtol=0, atol=tolerance * max(1.0, float(np.abs(right).max(initial=0)))))


def assert_orthonormal_rows(a: Matrix, tolerance: float = TOLERANCE) -> None:
    assert np.abs(a @ a.T - np.eye(len(a))).max(initial=0) < tolerance


def assert_signs_fixed(a: Matrix) -> None:
    """The largest entry of each row is positive (two entries of one size may share the title)."""
    assert (a.max(axis=1) >= np.abs(a).max(axis=1) * (1 - 1e-9)).all()


@given(several, st.data())
def test_weighted_sum_is_the_dense_sum(terms: list[LowRank], data: st.DataObject) -> None:
    weights = data.draw(st.lists(st.floats(-3, 3), min_size=len(terms), max_size=len(terms)))
    total = weighted_sum(list(zip(weights, terms, strict=True)))
    assert close(dense(total), sum((w * dense(t) for w, t in zip(weights, terms, strict=True)), np.zeros(())))
    assert total.rank == sum(t.rank for t in terms)


def test_a_sum_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no low-rank terms"):
        weighted_sum([])


def test_the_mean_of_factors_is_not_the_mean_of_products() -> None:
    """The negative control: what FedIT averages is another matrix, and these tests can tell."""
    random = np.random.default_rng(0)
    terms = [LowRank(random.standard_normal((6, 2)), random.standard_normal((2, 5))) for _ in range(3)]
    exact = np.mean([dense(t) for t in terms], axis=0)
    of_factors = LowRank(np.mean([t.b for t in terms], axis=0), np.mean([t.a for t in terms], axis=0))
    assert close(dense(weighted_sum([(1 / 3, t) for t in terms])), exact)
    assert not close(dense(of_factors), exact, tolerance=0.1)


@given(one, ranks)
def test_truncate_equals_its_reference(term: LowRank, rank: int) -> None:
    truncated = term.truncate(rank)
    assert truncated.rank == rank
    assert truncated.b.shape == (term.b.shape[0], rank)
    singular = np.append(np.linalg.svd(dense(term), compute_uv=False), [0.0] * 13)
    if singular[rank - 1] - singular[rank] > 1e-3 * singular[0] or singular[rank] < 1e-9:  # else it is not unique
        assert close(dense(truncated), truncate_reference(dense(term), rank), tolerance=1e-7)


@given(one, ranks)
def test_no_matrix_of_the_rank_is_nearer(term: LowRank, rank: int) -> None:
    """Eckart–Young: the error of a truncation is what the dropped singular values weigh."""
    dropped = np.linalg.svd(dense(term), compute_uv=False)[rank:]
    error = np.linalg.norm(dense(term) - dense(term.truncate(rank)))
    assert abs(error - np.linalg.norm(dropped)) < 1e-8 * (1 + np.linalg.norm(dense(term)))


@given(one, ranks)
def test_a_truncation_has_orthonormal_rows_and_fixed_signs(term: LowRank, rank: int) -> None:
    truncated = term.truncate(rank)
    kept = min(rank, term.rank, *dense(term).shape)
    assert_orthonormal_rows(truncated.a[:kept])
    assert not truncated.a[kept:].any()
    assert not truncated.b[:, kept:].any()
    assert_signs_fixed(truncated.a)
    norms = np.linalg.norm(truncated.b, axis=0)
    assert (np.diff(norms) <= TOLERANCE * (1 + norms[0])).all()


@given(one, ranks)
def test_a_truncation_does_not_depend_on_the_factors(term: LowRank, rank: int) -> None:
    """Same product, other signs of the factors: the same bits of sign come out."""
    assert close(dense(LowRank(-term.b, -term.a).truncate(rank)), dense(term.truncate(rank)))
    first, again = term.truncate(rank), term.truncate(rank)
    assert np.array_equal(first.a, again.a)
    assert np.array_equal(first.b, again.b)


@given(one, ranks)
def test_a_truncation_and_its_residual_make_the_whole(term: LowRank, rank: int) -> None:
    assert close(dense(term.truncate(rank)) + dense(term.residual(rank)), dense(term))


@given(several)
def test_norm_and_difference_equal_the_dense_ones(terms: list[LowRank]) -> None:
    first, last = terms[0], terms[-1]
    assert np.isclose(first.norm(), np.linalg.norm(dense(first)), rtol=1e-9, atol=1e-9)
    assert close(dense(first.minus(last)), dense(first) - dense(last))


@given(st.integers(MANY + 1, MANY + 40), st.floats(-3, 3), seeds)
def test_the_norm_of_many_terms_is_the_dense_one(rank: int, weight: float, seed: int) -> None:
    random = np.random.default_rng(seed)
    many = LowRank(random.standard_normal((7, rank)), random.standard_normal((rank, 600)))
    assert np.isclose(many.norm(), np.linalg.norm(dense(many)), rtol=1e-9)
    first = LowRank(random.standard_normal((7, 3)), random.standard_normal((3, 600)))
    both = weighted_sum([(weight, first), (1.0, many)])
    assert np.isclose(both.norm(), np.linalg.norm(dense(both)), rtol=1e-9)


def test_many_terms_that_cancel_have_a_norm_near_nothing() -> None:
    """The rounding that the docstring allows, and never NaN."""
    random = np.random.default_rng(0)
    many = LowRank(random.standard_normal((1000, MANY + 1)), random.standard_normal((MANY + 1, 20)))
    assert 0 <= many.minus(many).norm() <= 1e-7 * many.norm()


@given(one)
def test_singular_values_are_the_dense_ones(term: LowRank) -> None:
    found, expected = term.singular_values(), np.linalg.svd(dense(term), compute_uv=False)
    assert len(found) == min(term.rank, *dense(term).shape)
    assert close(found, expected[: len(found)])
    assert close(expected[len(found) :], np.zeros(1))


@pytest.mark.parametrize("count", [1, 2, 5])
def test_equal_singular_values_count_in_full(count: int) -> None:
    random = np.random.default_rng(count)
    b, a = (np.linalg.qr(random.standard_normal((9, count)))[0] for _ in range(2))
    for factors_ in (LowRank(3 * b, a.T), weighted_sum([(0.5, LowRank(b, a.T)), (2.0, LowRank(b, a.T))])):
        assert factors_.effective_rank() == pytest.approx(count, rel=1e-9)


def test_effective_rank_of_a_rank_one_matrix_of_nothing_and_of_something_between() -> None:
    random = np.random.default_rng(0)
    column, row = random.standard_normal((6, 1)), random.standard_normal((1, 8))
    assert LowRank(column @ np.ones((1, 4)), np.ones((4, 1)) @ row).effective_rank() == pytest.approx(1, abs=1e-9)
    assert LowRank(np.zeros((6, 4)), random.standard_normal((4, 8))).effective_rank() == 0.0
    assert LowRank(np.zeros((6, 0)), np.zeros((0, 8))).effective_rank() == 0.0
    between = LowRank(np.diag([3.0, 1.0]), np.eye(2))  # exp of the entropy of (3/4, 1/4)
    assert between.effective_rank() == pytest.approx(4 / 3**0.75, rel=1e-12)


@given(one)
def test_the_effective_rank_does_not_depend_on_size_or_gauge(term: LowRank) -> None:
    rank = term.effective_rank()
    assert 0 <= rank <= min(term.rank, *dense(term).shape) + 1e-9
    other = LowRank(100 * term.b[:, ::-1], term.a[::-1] / 3)
    assert other.effective_rank() == pytest.approx(rank, rel=1e-6)


def with_spectrum(values: list[float], outputs: int = 40, inputs: int = 30, spare: int = 12) -> LowRank:
    """A matrix of these singular values, in more columns than it needs."""
    random = np.random.default_rng(len(values))
    u = np.linalg.qr(random.standard_normal((outputs, len(values))))[0]
    v = np.linalg.qr(random.standard_normal((inputs, len(values))))[0]
    mixed = random.standard_normal((len(values), len(values) + spare))
    return LowRank(u * values @ mixed, np.linalg.pinv(mixed) @ v.T)


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize(
    "spectrum", [[9, 8, 7, 0.1, 0.05], [5, 5, 5], [1e-8, 1e-9, 1e-9], [4, *[2.0**-k for k in range(25)]]]
)
def test_dominant_is_the_truncation_where_there_is_a_gap(spectrum: list[float], rank: int) -> None:
    term = with_spectrum(spectrum)
    found, residual = term.dominant(rank, 1e-9)
    assert residual <= 1e-9
    assert found.rank == rank
    assert_orthonormal_rows(found.a, 1e-8)
    assert_signs_fixed(found.a)
    dropped = np.linalg.svd(dense(term), compute_uv=False)[rank:]
    assert np.linalg.norm(dense(term) - dense(found)) == pytest.approx(np.linalg.norm(dropped), abs=1e-8 * spectrum[0])
    if rank < len(spectrum) and spectrum[rank - 1] > 1.5 * spectrum[rank]:
        assert close(dense(found) / spectrum[0], dense(term.truncate(rank)) / spectrum[0], 1e-7)


def test_dominant_without_a_gap_says_so() -> None:
    """A flat, slowly falling spectrum far beyond the block: what is claimed is what is measured on the matrix."""
    term = with_spectrum([1 - k / 4000 for k in range(200)], 260, 240, 100)
    found, residual = term.dominant(4, 1e-9)
    u = found.b / np.linalg.norm(found.b, axis=0)
    missed = dense(term) @ found.a.T - u * np.linalg.norm(found.b, axis=0)
    assert residual > 1e-6
    largest = np.linalg.norm(missed, axis=0).max() / np.linalg.norm(found.b, axis=0).max()
    assert residual == pytest.approx(largest, rel=0.05)


@given(one, ranks)
def test_dominant_of_small_matrices_is_as_good_as_the_truncation(term: LowRank, rank: int) -> None:
    """Here the block holds all there is."""
    found, residual = term.dominant(rank)
    assert residual <= 1e-6
    assert found.rank == rank
    best, reached = (np.linalg.norm(dense(term) - dense(kept)) for kept in (term.truncate(rank), found))
    assert abs(reached - best) <= 1e-7 * (1 + np.linalg.norm(dense(term)))
    again = term.dominant(rank)[0]
    assert np.array_equal(again.a, found.a)
    assert np.array_equal(again.b, found.b)


@st.composite
def spectra(draw: st.DrawFn) -> list[float]:
    """Falling: a few decades up to ten, clusters of nearly equal values, exactly repeated ones, any number of zeros."""
    count, decades = draw(st.integers(1, 20)), draw(st.floats(0, 10))
    values = 10 ** -np.linspace(0, decades, count)
    spread = draw(st.sampled_from([0.0, 1e-12, 1e-6, 1e-2]))
    values = np.repeat(values, draw(st.integers(1, 3)))
    values *= 1 + spread * np.random.default_rng(draw(seeds)).random(len(values))
    return [*sorted(values.tolist(), reverse=True), *([0.0] * draw(st.sampled_from([0, 0, 3])))]


def assert_as_good(found: LowRank, plain: LowRank, term: LowRank, rank: int, tolerance: float) -> None:
    """Eckart–Young to the rounding, and the very matrix where a gap makes it unique; all relative to ‖b·a‖."""
    exact = dense(LowRank(term.b.astype(np.float64), term.a.astype(np.float64)))
    made, expected = (dense(LowRank(k.b.astype(np.float64), k.a.astype(np.float64))) for k in (found, plain))
    singular = np.append(np.linalg.svd(exact, compute_uv=False), [0.0] * (rank + 1))
    assert found.b.dtype == found.a.dtype == term.b.dtype
    assert found.rank == rank
    assert abs(np.linalg.norm(exact - made) - np.linalg.norm(singular[rank:])) <= tolerance * singular[0]
    assert_orthonormal_rows(found.a, tolerance)
    if singular[rank - 1] - singular[rank] > 0.1 * singular[0] or singular[rank] <= tolerance * singular[0]:
        assert np.linalg.norm(made - expected) <= 10 * tolerance * singular[0]
        assert np.linalg.norm(made - truncate_reference(exact, rank)) <= 10 * tolerance * singular[0]


@given(spectra(), st.integers(1, 6), st.sampled_from([(np.float64, 1e-12), (np.float32, 1e-5)]), st.integers(-9, 9))
def test_few_columns_of_many_are_the_plain_truncation(
    spectrum: list[float], rank: int, precision: tuple[type, float], scale: int
) -> None:
    """Whatever the spectrum and the size: either the proof holds and the answer is right, or it is the plain one's."""
    dtype, tolerance = precision
    term = with_spectrum([10.0**scale * value for value in spectrum], 80, 70, 30)
    term = LowRank(term.b.astype(dtype), term.a.astype(dtype))
    plain = term._by_svd(rank)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lowrank, "FEW", 0)
        assert_as_good(term.truncate(rank), plain, term, rank, tolerance)


@given(one, st.integers(0, 4))
def test_the_iteration_takes_any_shape(term: LowRank, rank: int) -> None:
    plain = term._by_svd(rank)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lowrank, "FEW", 0)
        found = term.truncate(rank)
    assert found.b.shape == plain.b.shape
    assert found.a.shape == plain.a.shape
    assert np.isclose(np.linalg.norm(dense(term) - dense(found)), np.linalg.norm(dense(term) - dense(plain)), atol=1e-9)


@pytest.mark.parametrize("spectrum", [[3, 2, *[0.05] * 150], [5, 5, *[1e-10] * 9], [1, 1e-2, 1e-4, 0, 0], [4]])
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-5), (np.float64, 1e-12)])
def test_a_stack_of_many_nodes_needs_no_svd_of_its_size(
    spectrum: list[float], dtype: type, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Noise below the common part, equal values, a falling spectrum, and less rank than is kept."""
    term = with_spectrum(spectrum, 240, 230, 200)
    plain = term._by_svd(2)
    monkeypatch.setattr(LowRank, "_by_svd", None)
    term = LowRank(term.b.astype(dtype), term.a.astype(dtype))
    assert_as_good(term.truncate(2), plain, term, 2, tolerance)


def taken_whole(term: LowRank, rank: int) -> bool:
    """Whether `truncate` fell back; what it returns is then the plain answer, bit for bit."""
    assert (rank + lowrank.OVERSAMPLING) * lowrank.FEW <= min(*term.b.shape, *term.a.shape), "else nothing is tried"
    return term._leading(rank) is None and np.array_equal(term.truncate(rank).b, term._by_svd(rank).b)


def test_a_flat_spectrum_falls_back_to_the_svd() -> None:
    assert taken_whole(with_spectrum([1 - k / 4000 for k in range(200)], 260, 240, 100), 4)


def test_a_start_that_misses_the_largest_falls_back_to_the_svd(monkeypatch: pytest.MonkeyPatch) -> None:
    """The iteration settles, on the wrong triples: its residual is nothing, and only the bound on the rest can tell."""
    size, rank = 200, 4
    diagonal = np.array([1.0] * rank + [1e-1] * 20 + [1e-3] * (size - rank - 20))
    diagonal[-1] = 2.0  # no column of the start below reaches it
    term = LowRank(np.diag(diagonal), np.eye(size))
    monkeypatch.setattr(lowrank, "_start", np.eye)
    found, residual = term.dominant(rank)
    assert residual <= 1e-12
    assert np.linalg.norm(found.b, axis=0) == pytest.approx([1.0] * rank)
    assert taken_whole(term, rank)
    assert np.linalg.norm(term.truncate(rank).b, axis=0) == pytest.approx([2.0, 1.0, 1.0, 1.0])
    diagonal[-1] = 1e-3  # the control: the same start, and nothing to miss
    assert not taken_whole(LowRank(np.diag(diagonal), np.eye(size)), rank)


@given(one, st.floats(0.01, 100))
def test_a_contraction_is_never_claimed_of_what_is_none(term: LowRank, size: float) -> None:
    largest = float(np.linalg.svd(dense(term), compute_uv=False)[0])
    scaled = LowRank(term.b * (size / largest if largest > 0 else 1.0), term.a)
    if scaled._is_contraction():
        assert size <= 1 or largest == 0


@pytest.mark.parametrize("bad", [np.nan, 1e200])
def test_what_is_not_finite_is_no_contraction(bad: float) -> None:
    assert not LowRank(np.full((3, 2), bad), np.full((2, 3), bad))._is_contraction()


@given(one, st.floats(-4, 4), seeds)
def test_merge_adds_the_scaled_product(term: LowRank, scaling: float, seed: int) -> None:
    weight = np.asarray(np.random.default_rng(seed).standard_normal(dense(term).shape))
    assert close(term.merge(weight, scaling), weight + scaling * dense(term))


def wide(rank: int, seed: int) -> Matrix:
    """An orthonormal A, (rank, rank + 3)."""
    return np.asarray(np.linalg.qr(np.random.default_rng(seed).standard_normal((rank + 3, rank)))[0].T)


@given(outputs_only, seeds)
def test_refactor_equals_its_reference(b: Matrix, seed: int) -> None:
    a = wide(b.shape[1], seed)
    new_b, rotation = refactor(b)
    assert new_b.shape == b.shape
    assert rotation.shape == (b.shape[1], b.shape[1])
    assert close(new_b @ (rotation @ a), b @ a)
    reference_b, reference_a = refactor_reference(b, a)
    assert close(new_b @ (rotation @ a), reference_b @ reference_a)
    norms = np.zeros(b.shape[1])
    norms[: reference_b.shape[1]] = np.linalg.norm(reference_b, axis=0)
    assert close(np.linalg.norm(new_b, axis=0), norms)


@given(outputs_only, seeds)
def test_refactor_gives_an_orthogonal_rotation_and_orthogonal_falling_columns(b: Matrix, seed: int) -> None:
    new_b, rotation = refactor(b)
    assert_orthonormal_rows(rotation)
    assert_orthonormal_rows(rotation @ wide(b.shape[1], seed))
    assert_signs_fixed(rotation)
    gram = new_b.T @ new_b
    assert close(gram, np.diag(np.diag(gram)), tolerance=1e-9 * (1 + np.abs(gram).max()))
    norms = np.sqrt(np.diag(gram))
    assert (np.diff(norms) <= TOLERANCE * (1 + norms[0])).all()


def test_refactor_needs_an_orthonormal_a() -> None:
    """The control: over another A the columns still multiply out, but are no singular vectors of the product."""
    random = np.random.default_rng(0)
    b, a = random.standard_normal((6, 3)), random.standard_normal((3, 7))
    new_b, rotation = refactor(b)
    assert close(new_b @ (rotation @ a), b @ a)
    assert not close(np.linalg.norm(new_b, axis=0), np.linalg.svd(b @ a, compute_uv=False)[:3], tolerance=0.1)


@given(outputs_only)
def test_refactoring_twice_changes_nothing_more(b: Matrix) -> None:
    new_b, _ = refactor(b)
    again, rotation = refactor(new_b)
    assert close(again @ rotation, new_b)
    assert close(np.linalg.norm(again, axis=0), np.linalg.norm(new_b, axis=0))


@given(one)
def test_orthonormalize_keeps_the_product(term: LowRank) -> None:
    if term.rank > term.a.shape[1]:
        with pytest.raises(ValueError, match="cannot have orthonormal rows"):
            orthonormalize(term.b, term.a)
        return
    b, a = orthonormalize(term.b, term.a)
    assert close(b @ a, dense(term))
    assert_orthonormal_rows(a)


@pytest.mark.parametrize("rank", [1, 8])
def test_fp32_keeps_six_digits_at_the_size_of_a_layer(rank: int) -> None:
    random = np.random.default_rng(0)
    b = random.standard_normal((1024, rank)).astype(np.float32)
    a = np.linalg.qr(random.standard_normal((1024, rank)))[0].T.astype(np.float32)
    product = b.astype(np.float64) @ a.astype(np.float64)

    def relative_error(new_b: Matrix, new_a: Matrix) -> float:
        made = new_b.astype(np.float64) @ new_a.astype(np.float64)
        return float(np.linalg.norm(made - product) / np.linalg.norm(product))

    for dtype in (np.float32, np.float64):
        new_b, rotation = refactor(b, dtype)
        assert new_b.dtype == rotation.dtype == dtype
        assert relative_error(new_b, rotation @ a) <= 1e-6
    for kept in (rank, rank + 3):
        truncated = LowRank(b, a).truncate(kept)
        assert truncated.b.dtype == truncated.a.dtype == np.float32
        assert relative_error(truncated.b, truncated.a) <= 1e-6
    total = weighted_sum([(0.25, LowRank(b, a)), (0.75, LowRank(b, a))])
    assert total.b.dtype == np.float32
    assert relative_error(total.truncate(rank).b, total.truncate(rank).a) <= 1e-6
    assert relative_error(*orthonormalize(b, 3 * a / 3)) <= 1e-6


@pytest.mark.parametrize("many", [-1, MANY])
@given(dims, dims, st.integers(0, 5), st.integers(0, 9999))
def test_norm_and_distance_are_the_dense_ones(many: int, outputs: int, inputs: int, rank: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    one, two = (
        LowRank(random.standard_normal((outputs, r)), random.standard_normal((r, inputs))) for r in (rank, 5 - rank)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lowrank, "MANY", many)
        norm, distance = one.norm_and_distance(two)
        assert one.norm() == pytest.approx(norm, abs=1e-7)
    assert norm == pytest.approx(np.linalg.norm(one.b @ one.a), abs=1e-7)
    assert distance == pytest.approx(np.linalg.norm(one.b @ one.a - two.b @ two.a), abs=1e-7)


def test_many_nodes_with_tiny_modules_need_no_matrix_of_their_columns() -> None:
    """10⁴ nodes of rank 8: a Gram matrix of their columns would take 51 GB."""
    random = np.random.default_rng(0)
    many = LowRank(random.standard_normal((5, 80_000)), random.standard_normal((80_000, 3)))
    few = LowRank(random.standard_normal((5, 2)), random.standard_normal((2, 3)))
    norm, distance = many.norm_and_distance(few)
    assert norm == many.norm() == pytest.approx(np.linalg.norm(dense(many)))
    assert distance == pytest.approx(np.linalg.norm(dense(many) - dense(few)))
    assert few.norm_and_distance(many)[1] == pytest.approx(distance)
