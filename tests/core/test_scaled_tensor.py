"""float8 numbers with scales: what they stand for, and what rounding to them does."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lox_hf import NumericsError
from lox_hf.core.scaled import Blocks, ScaledTensor, round_rows, upcast

DTYPE = torch.float8_e4m3fn


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def spread_scales(scales: Tensor) -> Tensor:
    """Scales of 48 x 40 blocks by entry of a 100 x 88 matrix."""
    return scales.repeat_interleave(48, 0)[:100].repeat_interleave(40, 1)[:, :88]


def test_scaled_tensor_is_the_float32_tensor() -> None:
    """Rows, matrices and everything else are those of the plain tensor; rows do not need the whole."""
    blocks, weight = Blocks(48, 40), draw(100, 88)
    codes, scales = round_rows(weight.clone(), blocks.largest(weight) / 448, DTYPE, blocks)
    plain = (codes.float() * spread_scales(scales)).contiguous()
    scaled = ScaledTensor(codes, scales, blocks)
    picks: list[Callable[[Tensor], Any]] = [
        lambda tensor: tensor[3:97],
        lambda tensor: tensor[::7][3:9],
        lambda tensor: tensor[50:50],
        lambda tensor: tensor.index_select(0, torch.tensor([99, 2, 48])),
        lambda tensor: tensor[:, 5:9],
        lambda tensor: tensor.view(100, 88)[1:2],
        lambda tensor: tensor.T @ tensor,
        lambda tensor: tensor.double().sum(0),
        lambda tensor: tensor.detach().flatten()[::9],
    ]
    for pick in picks:
        found, expected = pick(scaled), pick(plain)
        assert found.shape == expected.shape
        assert (found + 0).equal(expected)
        assert torch.zeros_like(expected).copy_(found).equal(expected)
        assert torch.zeros_like(expected).sub_(found).equal(-expected + 0)
    assert torch.zeros(88, 100).T.copy_(scaled).equal(plain)
    assert torch.zeros(100, 88, dtype=torch.float64).copy_(scaled).equal(plain.double())
    assert torch.zeros_like(plain).sub_(scaled, alpha=2).equal(-2 * plain + 0)
    assert all(isinstance(rows, ScaledTensor) for rows in (scaled[3:97], scaled[1::7], scaled[50:60][2:4]))
    first, second = scaled[:10], scaled[10:20]  # neither takes the other's place
    assert torch.cat([first, second]).equal(plain[:20])
    stack = ScaledTensor(codes[None], scales[None], blocks)
    assert [type(one) for one in stack] == [ScaledTensor]
    assert (stack + 0).equal(plain[None])


@pytest.mark.parametrize(("size", "low", "high"), [(0.1, 0.98, 1.0), (0.03, 0.75, 0.85), (0.01, 0.33, 0.43)])
def test_what_rounding_keeps(size: float, low: float, high: float) -> None:
    """The figures that users are warned with: how much of an addition of this size, by norm, float8 keeps."""
    blocks, weight = Blocks(128, 128), draw(512, 512)
    codes, scales = round_rows(weight.clone(), blocks.largest(weight) / 448, DTYPE, blocks)
    aligned = ScaledTensor(codes, scales, blocks).dense()
    added = draw(512, 6, seed=1) @ draw(6, 512, seed=2)
    added *= size * aligned.norm() / added.norm()
    found = ScaledTensor(*round_rows(aligned + added, scales, DTYPE, blocks), blocks).dense() - aligned
    assert low <= (found * added).sum() / added.square().sum() <= high


def test_a_scale_is_raised_only_where_the_largest_number_is_not_the_nearest() -> None:
    blocks, scales = Blocks(1, 2), torch.ones(4, 1)
    rows = torch.tensor([[448.0, 3.0], [463.9, 3.0], [464.1, 3.0], [-896.0, 0.0]])
    codes, raised = round_rows(rows.clone(), scales, DTYPE, blocks)
    assert raised.flatten().tolist() == pytest.approx([1, 1, 464.1 / 448, 2])
    assert codes[:, 0].tolist() == [448, 448, 448, -448]
    _, powers = round_rows(rows.clone(), scales, DTYPE, Blocks(1, 2, powers_of_two=True))
    assert powers.flatten().tolist() == [1, 1, 2, 2]
    with pytest.raises(NumericsError, match="overflows float8_e4m3fn"):
        round_rows(rows.clone(), scales, DTYPE, Blocks(1, 2, stored=None))
    assert round_rows(rows[:2].clone(), scales[:2], DTYPE, Blocks(1, 2, stored=None))[0][:, 0].tolist() == [448, 448]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(value: float) -> None:
    rows = draw(4, 6)
    rows[3, 5] = value
    with pytest.raises(NumericsError, match="NaN or Inf"):
        round_rows(rows, torch.ones(2, 2), DTYPE, Blocks(3, 4))


def test_a_block_of_zeros_has_no_scale_to_divide_by() -> None:
    codes, scales = round_rows(torch.tensor([[0.0, 0.0], [0.0, 4.48]]), torch.zeros(2, 1), DTYPE, Blocks(1, 2))
    assert codes.tolist() == [[0, 0], [0, 448]]
    assert scales.flatten().tolist() == pytest.approx([0, 0.01])


def to_float32(codes: Tensor) -> Tensor:
    return upcast(codes, torch.empty(codes.shape))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_every_number_is_upcast_exactly(dtype: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(dtype)
    plain = codes[~codes.float().isnan()]
    assert to_float32(plain).view(torch.int32).equal(plain.float().view(torch.int32))  # -0.0 too
    for number in codes[codes.float().isnan()]:
        assert to_float32(torch.cat([plain.view(torch.uint8), number[None].view(torch.uint8)]).view(dtype))[-1].isnan()
    assert to_float32(codes[:0]).shape == (0,)
