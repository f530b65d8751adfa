"""The paper's equation in float64, written from the paper alone, and how near a stored result must come to it.

W_LoX = W_aligned + alpha * Proj_k(dW), dW = W_aligned - W_base, where Proj_k(M) = U_:k U_:k^T M with U from the full
singular value decomposition of dW. A tensor of more than two dims is a stack of matrices over its leading axes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

Tensors = Mapping[str, torch.Tensor]

# Rounding once from the exact result would leave no difference. Ours rounds a float32 result, whose own error is
# about 2^-24 against half a unit of 2^-9 (bfloat16) or 2^-12 (float16): a few entries in ten thousand lie so near a
# tie that they round the other way.
DIFFERING_SHARE = 1e-3

# A float32 file stores the float32 arithmetic itself: the rounding of dW, of alpha * P and of the sum, and the
# decomposition's own error, show in the last bits of many entries. Bounded against the tensor's largest entry.
FLOAT32_ERROR_SHARE = 2.0**-20

_BIT_VIEWS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


def expected_hardened(
    aligned: Tensors,
    base: Tensors,
    r: int | None,
    alpha: float,
    *,
    is_target: Callable[[str], bool] = lambda name: True,
) -> dict[str, torch.Tensor]:
    """Harden every tensor of two or more dims in float64; the others come back as they are.

    Args:
        aligned: The aligned tensors, by checkpoint name.
        base: The base tensors, by the same names.
        r: How many directions, the paper's k; None for the full rank.
        alpha: The strength.
        is_target: Which of the names to harden.
    """
    return {
        name: harden_stack(tensor, base[name], r, alpha)
        if tensor.ndim >= 2 and tensor.is_floating_point() and is_target(name)
        else tensor
        for name, tensor in aligned.items()
    }


def harden_stack(aligned: torch.Tensor, base: torch.Tensor, r: int | None, alpha: float) -> torch.Tensor:
    """Harden the matrices in the last two dims, in float64."""
    exact = aligned.double()
    delta = exact - base.double()
    return exact + alpha * (delta if r is None else project(delta, r))


def project(delta: torch.Tensor, r: int) -> torch.Tensor:
    """Project on the r left singular vectors with the largest singular values: U_:r U_:r^T delta."""
    left = torch.linalg.svd(delta, full_matrices=False).U[..., :r]
    return left @ (left.mT @ delta)


def ulp_distance(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Count the representable numbers from `left` to `right`, entry by entry; +0 and -0 are the same number."""
    assert left.dtype == right.dtype, f"{left.dtype} against {right.dtype}"
    return (_order(left) - _order(right)).abs()


def _order(tensor: torch.Tensor) -> torch.Tensor:
    """Map each number to its place among the representable ones, zero at 0."""
    bits = tensor.contiguous().view(_BIT_VIEWS[tensor.dtype]).long()
    magnitude = bits & torch.iinfo(_BIT_VIEWS[tensor.dtype]).max
    return torch.where(bits < 0, -magnitude, magnitude)


def assert_close_to_oracle(actual: Tensors, expected: Tensors, dtype: torch.dtype | None = None) -> None:
    """Fail unless `actual` is `expected`, rounded once, but for a few entries in ten thousand.

    Args:
        actual: The hardened tensors as stored.
        expected: What `expected_hardened` gave for them.
        dtype: The dtype every tensor must be stored in; None takes what `actual` has.
    """
    assert set(actual) == set(expected), f"other names: {sorted(set(actual) ^ set(expected))}"
    verdicts = {name: _compare(actual[name], expected[name], dtype or actual[name].dtype) for name in sorted(expected)}
    failures = [f"{name}: {verdict}" for name, verdict in verdicts.items() if verdict]
    assert not failures, "far from the oracle:\n" + "\n".join(failures)


def _compare(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> str | None:
    """Say what is wrong with one tensor, or nothing."""
    if actual.dtype != dtype or actual.shape != expected.shape:
        return f"{actual.dtype} {tuple(actual.shape)} against {dtype} {tuple(expected.shape)}"
    if dtype == torch.float32:
        share = ((actual.double() - expected.double()).abs().max() / expected.double().abs().max()).item()
        return None if share <= FLOAT32_ERROR_SHARE else f"off by {share:.2e} of the largest entry"
    # From float64 torch rounds by way of float32; the tie this can turn is rarer than one in ten million.
    distance = ulp_distance(actual, expected.to(dtype))
    differing, allowed = int((distance > 0).sum()), max(1, int(DIFFERING_SHARE * distance.numel()))
    # Where aligned and its change cancel, the rest is float32's own error, and its spacing is finer than that.
    error = (actual.double() - expected.double()).abs()
    cancelled = error <= FLOAT32_ERROR_SHARE * expected.double().abs().max()
    worst = int(torch.where(cancelled, 0, distance).max())
    if worst <= 1 and differing <= allowed:
        return None
    return f"{differing} of {distance.numel()} entries differ ({allowed} allowed), by up to {worst} ulp (1 allowed)"
