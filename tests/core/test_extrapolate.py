"""The equation in every dtype, and the way back."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from spectra import exact, pair
from torch import Tensor

from lox_hf.core.delta import Delta
from lox_hf.core.extrapolate import FullPart, LowRankPart, extrapolate
from lox_hf.core.lowrank import LowRank, decompose
from lox_hf.edit.undo import Undo
from lox_hf.errors import NumericsError

SHAPE = (200, 130)
VALUES = [0.5, 0.4, 0.3, 0.1, 0.05]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def run(aligned: Tensor, factors: LowRank, alpha: float) -> Tensor:
    result = torch.full_like(aligned, float("nan"))
    extrapolate(aligned, LowRankPart(factors, alpha), lambda part, tile: result[part].copy_(tile))
    return result


def allowed(result: Tensor, aligned: Tensor) -> Tensor:
    """Half an ulp of the stored dtype, and float32's error of the sum, which is relative to its terms."""
    info = torch.finfo(result.dtype)
    ulp = info.eps * torch.exp2(torch.floor(torch.log2(result.double().abs().clamp_min(info.smallest_normal))))
    return 0.5 * ulp + 8 * torch.finfo(torch.float32).eps * (aligned.double().abs() + 0.05)


@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_equation_in_float64_rounded_once(dtype: torch.dtype) -> None:
    aligned, base = pair(SHAPE, VALUES, noise=1e-3, dtype=dtype)
    u, s, vh = exact(aligned, base)
    expected = aligned.double() + 1.25 * (u[:, :3] * s[:3]) @ vh[:3]
    actual = run(aligned, decompose(Delta(aligned, base), 3, svd="exact").factors, 1.25)
    wrong = actual != expected.to(dtype)
    # float32 sums: a result that lies within their error of a rounding boundary goes to the neighbour
    assert dtype == torch.float32 or wrong.float().mean() < 5e-3
    assert ((actual.double() - expected).abs() <= allowed(actual, aligned)).all()
    assert not ((aligned.double() - expected).abs() <= allowed(actual, aligned)).all()  # control: something was added


@pytest.mark.parametrize("dtype", DTYPES)
def test_full_rank_is_the_aligned_weight_plus_alpha_times_the_change(dtype: torch.dtype) -> None:
    aligned, base = pair(SHAPE, VALUES, noise=1e-3, dtype=dtype)
    result = torch.full_like(aligned, float("nan"))
    full = FullPart(Delta(aligned, base), 0.7)
    extrapolate(aligned, full, lambda part, tile: result[part].copy_(tile))
    change = aligned.double() - base.double()
    expected = aligned.double() + 0.7 * change
    assert ((result.double() - expected).abs() <= allowed(result, aligned)).all()
    assert full.energy == pytest.approx(change.square().sum().item(), rel=1e-5)


def test_overflow_is_refused_and_a_large_result_is_not() -> None:
    aligned, base = torch.full((80, 70), 100.0, dtype=torch.float16), torch.zeros((80, 70), dtype=torch.float16)
    factors = decompose(Delta(aligned, base), 1).factors
    assert run(aligned, factors, 600.0).isfinite().all()
    with pytest.raises(NumericsError, match="overflows float16"):
        run(aligned, factors, 700.0)


@settings(max_examples=30, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    alpha=st.floats(0.05, 3),
    scale=st.floats(1e-4, 1.0),
    seed=st.integers(0, 1000),
    full=st.booleans(),
)
def test_undo_gives_the_bits_back(dtype: torch.dtype, alpha: float, scale: float, seed: int, full: bool) -> None:
    aligned, base = pair((90, 70), [scale, scale / 2], noise=scale / 50, seed=seed, dtype=dtype)
    aligned[0, :3] = torch.tensor([0.0, -0.0, 1e-6])
    delta, weight = Delta(aligned.clone(), base), aligned.clone()
    added = FullPart(delta, alpha) if full else LowRankPart(decompose(delta, 2).factors, alpha)
    undo = Undo(weight, added)
    extrapolate(weight, added, undo.write)
    assert not torch.equal(weight, aligned)
    assert undo.unchanged() and undo.revert()
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(weight.view(bits), aligned.view(bits))


def test_undo_notices_a_change() -> None:
    aligned, base = pair((90, 70), VALUES)
    factors = decompose(Delta(aligned, base), 2).factors
    undo = Undo(aligned, LowRankPart(factors, 1.0))
    extrapolate(aligned, undo.added, undo.write)
    assert undo.unchanged()
    aligned[3, 4] += 1e-3
    assert not undo.unchanged()
