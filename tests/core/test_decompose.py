"""The decomposition against float64 SVDs: what it finds, what it certifies, and what it refuses."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from spectra import edge, exact, pair, projector_error

from lox_hf.core import lanczos
from lox_hf.core.delta import Delta
from lox_hf.core.lowrank import decompose, from_lora
from lox_hf.errors import NumericsError

NOISE = 1e-4
SHAPES = [(300, 200), (200, 300), (1024, 256), (256, 1024)]


def with_gap(shape: tuple[int, int]) -> list[float]:
    return [edge(shape, NOISE) * factor for factor in (20, 16, 12, 10, 9, 8, 6.6, 6, 5)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_projector_is_that_of_the_exact_svd_where_there_is_a_gap(shape: tuple[int, int], dtype: torch.dtype) -> None:
    aligned, base = pair(shape, with_gap(shape), noise=NOISE, dtype=dtype)
    u, s, _ = exact(aligned, base)
    found = decompose(Delta(aligned, base), 6)
    assert found.method == "lanczos"
    assert projector_error(found.factors.U, u[:, :6]) < 1e-4
    assert torch.allclose(found.factors.S.double(), s[:6], rtol=1e-5)  # float32 sums over the rows
    assert projector_error(found.factors.U, u[:, 1:7]) > 0.9  # control: neighbouring directions are told apart


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(65, 260),
    columns=st.integers(65, 260),
    k=st.integers(1, 8),
    strength=st.floats(3, 100),
    seed=st.integers(0, 1000),
)
def test_residual_is_what_it_claims_and_below_the_tolerance(
    rows: int, columns: int, k: int, strength: float, seed: int
) -> None:
    shape = (rows, columns)
    aligned, base = pair(shape, [strength * edge(shape, NOISE) / (i + 1) for i in range(k)], noise=NOISE, seed=seed)
    found = decompose(Delta(aligned, base), k, seed=seed)
    delta, factors = aligned.double() - base.double(), found.factors
    u, s, vh = factors.U.double(), factors.S.double(), factors.Vh.double()
    right = (delta.T @ u - vh.T * s).norm() / s.norm()
    left = (delta @ vh.T - u * s).norm() / s.norm()
    assert found.residual <= 1e-4
    assert max(left, right) <= found.residual + 1e-6  # the certificate, and what float32 adds to it
    assert max((u.T @ u - torch.eye(k)).abs().max(), (vh @ vh.T - torch.eye(k)).abs().max()) < 1e-5
    assert abs(found.energy - delta.square().sum()) < 1e-5 * found.energy


@pytest.mark.parametrize("shape", [(512, 256), (256, 512)])
def test_energy_is_optimal_even_where_there_is_no_gap(shape: tuple[int, int]) -> None:
    aligned, base = pair(shape, [0.0], noise=NOISE)
    _, s, _ = exact(aligned, base)
    found = decompose(Delta(aligned, base), 6)
    best = s[:6].square().sum().item()
    assert found.factors.S.double().square().sum().item() == pytest.approx(best, rel=1e-6)
    assert found.projector_bound > 1e-2  # and it says that the cut is not well defined


def test_wide_dynamic_range_is_resolved_by_deflation() -> None:
    shape = (600, 400)
    values = [edge(shape, NOISE) * factor for factor in (5000, 500, 100, 50, 10, 5, 2)]
    aligned, base = pair(shape, values, noise=NOISE)
    u, _, _ = exact(aligned, base)
    found = decompose(Delta(aligned, base), 6)
    assert found.method == "lanczos" and projector_error(found.factors.U, u[:, :6]) < 1e-4
    once = lanczos.block_lanczos(Delta(aligned, base), 6, tol=1e-4, seed=0)
    assert len(once.s) < 6  # control: one run alone does not reach them


@pytest.mark.parametrize(("rank", "r", "expected"), [(4, 6, 4), (6, 6, 6), (1, 6, 1)])
def test_rank_ends_where_the_change_ends(rank: int, r: int, expected: int) -> None:
    generator = torch.Generator().manual_seed(0)
    change = torch.randn(300, rank, generator=generator) @ torch.randn(rank, 200, generator=generator)
    found = decompose(Delta(change, torch.zeros(300, 200)), r)
    assert found.factors.rank == expected
    assert found.energy_share == pytest.approx(1, abs=1e-6)
    assert torch.allclose(found.factors.dense(), change, atol=1e-4 * change.abs().max())


def test_zero_change_has_rank_zero() -> None:
    found = decompose(Delta(torch.ones(300, 200), torch.ones(300, 200)), 6)
    assert (found.factors.rank, found.method, found.energy) == (0, "zero", 0.0)
    assert found.energy_share != found.energy_share and found.gap != found.gap  # NaN, not 0


def test_few_changed_rows_are_found_in_their_places(monkeypatch: pytest.MonkeyPatch) -> None:
    aligned, base = torch.zeros(2000, 128), torch.zeros(2000, 128)
    rows = torch.arange(7, 2000, 61)
    aligned[rows] = torch.randn(len(rows), 128, generator=torch.Generator().manual_seed(1))
    u, _, _ = exact(aligned, base)
    seen = []
    restrict = Delta.restrict
    monkeypatch.setattr(Delta, "restrict", lambda self, rows: seen.append(len(rows)) or restrict(self, rows))
    found = decompose(Delta(aligned, base), 3)
    assert seen == [len(rows)]
    assert projector_error(found.factors.U, u[:, :3]) < 1e-4
    assert found.factors.U.abs().sum(1).nonzero().squeeze(1).tolist() == rows.tolist()


@pytest.mark.parametrize("budget", ["BASIS_BUDGET_BYTES", "LEFT_BUDGET_BYTES"])
def test_small_memory_gives_the_same_directions(budget: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = (500, 300)
    aligned, base = pair(shape, with_gap(shape), noise=3 * NOISE)
    u, _, _ = exact(aligned, base)
    roomy = decompose(Delta(aligned, base), 6)
    monkeypatch.setattr(lanczos, budget, 1)
    tight = decompose(Delta(aligned, base), 6)
    assert projector_error(tight.factors.U, u[:, :6]) < 1e-4
    assert torch.allclose(tight.factors.S, roomy.factors.S, rtol=1e-5)


def test_sampled_start_only_saves_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = (2048, 512)
    aligned, base = pair(shape, [10 * value for value in with_gap(shape)], noise=NOISE)
    monkeypatch.setattr(lanczos, "SAMPLE_MIN_ELEMENTS", 10**12)
    plain = decompose(Delta(aligned, base), 6)
    monkeypatch.setattr(lanczos, "SAMPLE_MIN_ELEMENTS", 1)
    aimed = decompose(Delta(aligned, base), 6)
    assert aimed.steps < plain.steps
    assert projector_error(aimed.factors.U, plain.factors.U) < 1e-4


@pytest.mark.parametrize("share", [0.3, 0.8, 0.95, 1.0])
@pytest.mark.parametrize("svd", ["auto", "exact"])
def test_energy_share_takes_the_smallest_rank_that_reaches_it(share: float, svd: str) -> None:
    shape = (300, 200)
    aligned, base = pair(shape, with_gap(shape), noise=NOISE / 5)
    _, s, _ = exact(aligned, base)
    shares = s.square().cumsum(0) / s.square().sum()
    found = decompose(Delta(aligned, base), share, svd=svd)
    # at share 1 the last directions are float32 rounding and may be left out
    expected = int((shares < share * (1 - 1e-6)).sum()) + 1
    assert abs(found.factors.rank - expected) <= (0 if share < 1 else 2)
    assert found.energy_share >= share * (1 - 1e-5)


def test_exact_and_iterative_agree() -> None:
    shape = (300, 200)
    aligned, base = pair(shape, with_gap(shape), noise=NOISE)
    one, other = (decompose(Delta(aligned, base), 6, svd=svd) for svd in ("auto", "exact"))
    assert (one.method, other.method) == ("lanczos", "exact")
    assert projector_error(one.factors.U, other.factors.U) < 1e-4
    assert one.energy_share == pytest.approx(other.energy_share, rel=1e-5)
    assert one.gap == pytest.approx(other.gap, rel=0.05)  # s_7 of the Krylov space is an estimate from below


def test_seed_decides_alone_and_no_global_state_is_touched() -> None:
    aligned, base = pair((300, 200), with_gap((300, 200)), noise=NOISE)
    before = torch.get_rng_state()
    first, again = (decompose(Delta(aligned, base), 6, seed=3) for _ in range(2))
    assert torch.equal(first.factors.U, again.factors.U)
    assert torch.equal(before, torch.get_rng_state())
    other = decompose(Delta(aligned, base), 6, seed=4)
    assert not torch.equal(first.factors.U, other.factors.U)  # control: the seed is used


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("shape", [(300, 200), (40, 30)])
def test_not_finite_is_refused(value: float, shape: tuple[int, int]) -> None:
    aligned = torch.randn(shape)
    decompose(Delta(aligned, torch.zeros(shape)), 2)  # control
    aligned[-1, -1] = value
    with pytest.raises(NumericsError, match="NaN or Inf"):
        decompose(Delta(aligned, torch.zeros(shape)), 2)


def test_cast_base_subtracts_the_rounded_base() -> None:
    base = torch.randn(80, 70)
    aligned = base.bfloat16()
    assert decompose(Delta(aligned, base), 3).factors.rank == 3  # control: rounding alone is a change
    assert decompose(Delta(aligned, base, cast_base=True), 3).method == "zero"


@given(rank=st.integers(1, 6), scaling=st.floats(0.1, 4), seed=st.integers(0, 100))
@settings(max_examples=20, deadline=None)
def test_lora_factors_are_decomposed_exactly(rank: int, scaling: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    b, a = torch.randn(50, rank, generator=generator), torch.randn(rank, 40, generator=generator)
    found = from_lora(b, a, scaling)
    expected = decompose(Delta(scaling * b @ a, torch.zeros(50, 40)), rank, svd="exact").factors
    assert found.factors.rank == rank
    assert torch.allclose(found.factors.S, expected.S, rtol=1e-4)
    assert torch.allclose(found.factors.dense(), scaling * b @ a, atol=1e-4)
