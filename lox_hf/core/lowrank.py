"""The top k singular directions of one matrix's change: found with a certificate, exactly, or from LoRA factors."""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lox_hf.core.delta import Delta
from lox_hf.core.lanczos import Triplets, block_lanczos, block_size
from lox_hf.errors import NumericsError

SMALL_SIDE = 64
"""Matrices whose smaller side is at most this are decomposed exactly: there is nothing to save."""
FIRST_ENERGY_RANK = 8
NEGLIGIBLE = 1e-6
"""Directions below this share of s_1 are float32 rounding, not signal: they end the rank of dW."""


@dataclass(frozen=True)
class LowRank:
    """Proj_k(dW) = U_k U_k^T dW = U_k S_k V_k^T as its three factors (paper, section 3).

    Attributes:
        U: (m, k) float32, orthonormal columns.
        S: (k,) float32, descending, positive.
        Vh: (k, n) float32, orthonormal rows.
    """

    U: Tensor
    S: Tensor
    Vh: Tensor

    @property
    def rank(self) -> int:
        """Number of directions k."""
        return len(self.S)

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) of the matrix."""
        return len(self.U), self.Vh.shape[1]

    def rank_for(self, r: int | float | None, energy: float) -> int:
        """How many of the directions `r` asks for.

        Args:
            r: A number of directions, a share of the energy, or None for all.
            energy: ||dW||_F^2.

        Returns:
            The number, at most `rank`; all of them where the share is not reached.
        """
        if not isinstance(r, float):
            return self.rank if r is None else min(r, self.rank)
        reached = self.S.double().square().cumsum(0) >= r * energy * (1 - NEGLIGIBLE)
        return int(reached.int().argmax()) + 1 if reached.any() else self.rank

    def truncate(self, k: int) -> "LowRank":
        """Return the top k of the directions; all of them when there are no more than k."""
        return LowRank(self.U[:, :k], self.S[:k], self.Vh[:k])

    def to(self, device: torch.device) -> "LowRank":
        """Return the same directions on a device."""
        return LowRank(self.U.to(device), self.S.to(device), self.Vh.to(device))

    def dense(self) -> Tensor:
        """Return U S Vh, float32 (m, n)."""
        return (self.U * self.S) @ self.Vh


@dataclass(frozen=True)
class Decomposition:
    """A `LowRank` with what is known about how good it is.

    Attributes:
        factors: The directions; fewer than asked for only where dW has no more.
        energy: ||dW||_F^2.
        next_s: Estimate of s_(k+1), the first singular value that was cut off.
        residual: sqrt(sum_i ||dW^T u_i - s_i v_i||^2) / sqrt(sum_i s_i^2); 0 for exact methods.
        steps: Passes over dW; 0 for exact methods.
        method: "lanczos", "exact", "lora" or "zero".
    """

    factors: LowRank
    energy: float
    next_s: float
    residual: float
    steps: int
    method: str

    @cached_property
    def singular_values(self) -> Tensor:
        """S on the host, which waits for a device once for all that is asked of it."""
        return self.factors.S.cpu()

    @property
    def energy_share(self) -> float:
        """sum_i s_i^2 / ||dW||_F^2, in [0, 1]; NaN where dW is zero."""
        kept = self.singular_values.double().square().sum().item()
        return min(1.0, kept / self.energy) if self.energy > 0 else math.nan

    @property
    def gap(self) -> float:
        """(s_k - s_(k+1)) / s_1: how clearly the cut at k is defined; NaN where dW is zero."""
        s = self.singular_values.tolist()
        return (s[-1] - self.next_s) / s[0] if s else math.nan

    @property
    def projector_bound(self) -> float:
        """Upper estimate of ||Proj_k - exact Proj_k||: residual ||S_k||_F / (s_k - s_(k+1)) (Wedin)."""
        s = self.singular_values
        distance = self.gap * s[0].item() if len(s) else math.inf
        return self.residual * s.norm().item() / distance if distance > 0 else math.inf


def fits(shape: tuple[int, ...], k: int, svd: str) -> bool:
    """Whether a matrix is decomposed by block Lanczos: it saves nothing on small ones, and where k is large.

    Args:
        shape: (m, n).
        k: Number of directions.
        svd: "auto" or "exact".

    Returns:
        False where LAPACK takes it.
    """
    return svd != "exact" and min(shape) > SMALL_SIDE and 4 * block_size(k) <= min(shape)


def decompose(delta: Delta, r: int | float, *, svd: str = "auto", tol: float = 1e-4, seed: int = 0) -> Decomposition:
    """Find the top directions of dW.

    Args:
        delta: dW, (m, n).
        r: An int is the number of directions k (the paper's k), a float in (0, 1] the share of ||dW||_F^2 that the
            directions must hold: the smallest such k is taken.
        svd: "auto" (block Lanczos, certified; exact for small matrices or large k) or "exact" (LAPACK).
        tol: Residual at which block Lanczos stops.
        seed: Seed of its start block.

    Returns:
        The factors and their certificate.

    Raises:
        NumericsError: If dW contains NaN or Inf, or if no method converges.

    Example:
        >>> import torch
        >>> base = torch.zeros(256, 128)
        >>> aligned = torch.outer(torch.ones(256), torch.arange(128.0))
        >>> found = decompose(Delta(aligned, base), 1)
        >>> found.factors.rank, round(found.energy_share, 4)
        (1, 1.0)
    """
    if isinstance(r, float):
        return _by_energy(delta, r, svd=svd, tol=tol, seed=seed)
    k = min(r, *delta.whole_shape)
    if not fits(delta.whole_shape, k, svd):
        return exact(delta, k)
    return _iterative(delta, k, tol=tol, seed=seed) or exact(delta, k)


def exact(delta: Delta, k: int) -> Decomposition:
    """Decompose by LAPACK: float64 for small matrices, float32 otherwise, float64 again where that fails.

    Args:
        delta: dW, (m, n); formed as a whole.
        k: Number of directions to keep.

    Returns:
        The factors; residual and steps are 0.

    Raises:
        NumericsError: If dW contains NaN or Inf, or if LAPACK does not converge in float64 either.
    """
    dense = delta.dense()
    if not torch.isfinite(dense).all():
        raise NumericsError("dW contains NaN or Inf")
    energy = delta.agree(dense.double().square().sum()).item()
    if min(dense.shape) <= 4 * SMALL_SIDE:
        dense = dense.double()
    try:
        u, s, vh = _svd(dense)
    except torch.linalg.LinAlgError:
        try:
            u, s, vh = _svd(dense.double())
        except torch.linalg.LinAlgError as error:
            raise NumericsError(f"the SVD of dW {tuple(dense.shape)} did not converge in float64") from error
    s = delta.agree(s.double())
    keep = min(k, int((s > NEGLIGIBLE * s[0]).sum())) if energy > 0 else 0
    next_s = s[keep].item() if keep < len(s) else 0.0
    u, vh = (delta.agree(part.float().contiguous()) for part in (u[:, :keep], vh[:keep]))
    factors = LowRank(u, s[:keep].float(), vh)
    return Decomposition(factors, energy, next_s, 0.0, 0, "exact" if energy > 0 else "zero")


def from_lora(lora_b: Tensor, lora_a: Tensor, scaling: float) -> Decomposition:
    """Decompose dW = scaling * B A without forming it: QR of both factors and the SVD of a small core.

    Args:
        lora_b: (m, r), PEFT's `lora_B.weight`.
        lora_a: (r, n), PEFT's `lora_A.weight`.
        scaling: PEFT's scaling, lora_alpha / r or lora_alpha / sqrt(r).

    Returns:
        All singular directions of dW, at most r of them; exact up to float64 rounding.

    Raises:
        NumericsError: If a factor contains NaN or Inf.
    """
    if not (torch.isfinite(lora_b).all() and torch.isfinite(lora_a).all()):
        raise NumericsError("the LoRA factors contain NaN or Inf")
    left, left_core = torch.linalg.qr(lora_b.double())
    right, right_core = torch.linalg.qr(lora_a.double().T)
    u, s, vh = torch.linalg.svd(scaling * left_core @ right_core.T, full_matrices=False)
    keep = int((s > NEGLIGIBLE * s[0]).sum())
    factors = LowRank((left @ u)[:, :keep].float(), s[:keep].float(), (vh @ right.T)[:keep].float())
    return Decomposition(factors, s.square().sum().item(), 0.0, 0.0, 0, "lora" if keep else "zero")


def _svd(dense: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """SVD of the tall orientation: LAPACK is two times slower on wide matrices."""
    if dense.shape[0] >= dense.shape[1]:
        return torch.linalg.svd(dense, full_matrices=False)
    u, s, vh = torch.linalg.svd(dense.T, full_matrices=False)
    return vh.T, s, u.T


def _iterative(delta: Delta, k: int, *, tol: float, seed: int) -> Decomposition | None:
    """Block Lanczos, continued on the deflated dW where the spectrum spans too many orders; None if it fails."""
    first = found = block_lanczos(delta, k, tol=tol, seed=seed)
    factors, steps = LowRank(first.u, first.s, first.vh), first.steps
    negligible = NEGLIGIBLE**2 * first.energy
    while found.converged and 0 < len(found.s) and factors.rank < k:
        rest = delta.deflate(factors.U * factors.S, factors.Vh)
        found = block_lanczos(rest, k - factors.rank, tol=tol, seed=seed, negligible=negligible)
        factors, steps = _join(factors, found), steps + found.steps
    if not found.converged:
        return None
    residual = max(first.residual, found.residual)
    return Decomposition(
        factors, first.energy, found.next_s, residual, steps, "lanczos" if first.energy > 0 else "zero"
    )


def _join(head: LowRank, tail: Triplets) -> LowRank:
    return LowRank(torch.cat([head.U, tail.u], 1), torch.cat([head.S, tail.s]), torch.cat([head.Vh, tail.vh]))


def _by_energy(delta: Delta, share: float, *, svd: str, tol: float, seed: int) -> Decomposition:
    """Widen k fourfold until the share is reached, then cut at the smallest k that reaches it."""
    k = FIRST_ENERGY_RANK
    while True:
        found = decompose(delta, k, svd=svd, tol=tol, seed=seed)
        cut = found.factors.rank_for(share, found.energy)
        if cut < found.factors.rank or k >= min(delta.whole_shape) or found.factors.rank < k:
            break
        k = 4 * k
    next_s = found.factors.S[cut].item() if cut < found.factors.rank else found.next_s
    return Decomposition(found.factors.truncate(cut), found.energy, next_s, found.residual, found.steps, found.method)
