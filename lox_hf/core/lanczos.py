"""Certified top singular directions by block Lanczos on dW^T dW, reading dW in row tiles.

Method: Golub, Luk, Overton, "A block Lanczos method for computing the singular values and corresponding singular
vectors of a matrix" (ACM TOMS 7, 1981), with full reorthogonalisation and thick restarts (Wu, Simon, SIMAX 22, 2000).
Unlike a randomised SVD with a fixed number of passes it has a stopping test: the residual of every wanted direction
comes for free with the recurrence.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lox_hf.core.delta import Delta
from lox_hf.errors import NumericsError

MAX_STEPS = 80
SAMPLE_EVERY = 8
SAMPLE_STEPS = 3
SAMPLE_MIN_ELEMENTS = 2**19
"""In matrices from this size on, a few steps on an eighth of the rows aim the start block and save two full passes."""
BASIS_BUDGET_BYTES = 8 * 2**20
"""Size at which the Krylov basis is restarted: it bounds the memory, whatever the width of the matrix."""
LEFT_BUDGET_BYTES = 8 * 2**20
"""Products dW Q are kept up to this size, which saves a pass over dW; vocabulary-sized ones are formed again."""
DYNAMIC_RANGE = 0.02
"""Directions with s_i below this share of s_1 are left to a next run on the deflated dW: the recurrence squares the
singular values, and float32 cannot resolve smaller ones to the tolerance."""
DIRECTION_TOLERANCE = 10
"""Every direction's own relative residual must be below this many times the tolerance on all of them together."""
FEW_CHANGED_ROWS = 0.5
"""Below this share of changed rows the others are left out of every further pass."""


@dataclass(frozen=True)
class Triplets:
    """Singular triplets of dW with the certificate of the run that found them.

    Attributes:
        u: (m, k) float32, orthonormal columns.
        s: (k,) float32, descending.
        vh: (k, n) float32, orthonormal rows.
        energy: ||dW||_F^2.
        next_s: Estimate of s_(k+1) from below; 0 where the space was exhausted.
        residual: Bound on sqrt(sum_i ||dW^T u_i - s_i v_i||^2) / sqrt(sum_i s_i^2), and on that of dW v_i - s_i u_i.
        steps: Passes over dW.
        converged: Whether the residual is below the tolerance.
    """

    u: Tensor
    s: Tensor
    vh: Tensor
    energy: float
    next_s: float
    residual: float
    steps: int
    converged: bool


def block_size(k: int) -> int:
    """Width of a block: a multiple of 16, which CPU kernels need to be fast, with room for oversampling."""
    return 16 if k <= 8 else 16 * math.ceil((k + 8) / 16)


def block_lanczos(
    delta: Delta, k: int, *, tol: float, seed: int, negligible: float = 0.0, max_steps: int = MAX_STEPS
) -> Triplets:
    """Find the top k singular triplets of dW to a residual below `tol`.

    Args:
        delta: dW, (m, n).
        k: Number of directions, with 2 * `block_size(k)` at most min(m, n).
        tol: Stop when the residual (see `Triplets`) is below this, and that of each direction below ten times this.
        seed: Seed of the random start block.
        negligible: Energy ||dW||_F^2 at or below which dW is taken for zero.
        max_steps: Stop after so many passes, converged or not.

    Returns:
        The triplets, fewer than k when the rest lie below `DYNAMIC_RANGE`; `converged` is False when `max_steps` was
        not enough.

    Raises:
        NumericsError: If dW contains NaN or Inf.
    """
    generator = torch.Generator().manual_seed(seed)
    block = block_size(k)
    drawn = torch.randn((block, delta.shape[1]), generator=generator, device="cpu", dtype=torch.float32)
    start = orthonormal_rows(drawn.to(delta.device))
    if math.prod(delta.whole_shape) >= SAMPLE_MIN_ELEMENTS:
        aimed = _Recurrence(delta.sample(SAMPLE_EVERY), block, start).run(tol, negligible, SAMPLE_STEPS)
        start = orthonormal_rows(torch.cat([aimed.vh, start])[:block])
    return _Recurrence(delta, k, start).run(tol, negligible, max_steps)


@dataclass(frozen=True)
class _Ritz:
    """Approximate eigenvectors of dW^T dW in the basis, with the residual of all wanted ones and of the worst."""

    vectors: Tensor
    next_s: float
    residual: float
    worst: float


class _Recurrence:
    """The Krylov basis Q (its vectors are rows), the projection H = Q dW^T dW Q^T, and the products dW Q^T.

    Where the rows of dW are spread over processes each has Q and H, and the products of its own rows. What a rounding
    could turn one way here and another way there is agreed on: blocks, eigenvectors and the decision to stop.
    """

    def __init__(self, delta: Delta, k: int, start: Tensor) -> None:
        self.delta, self.k, self.block = delta, k, len(start)
        columns = delta.shape[1]
        self.capacity = max(4, BASIS_BUDGET_BYTES // (4 * columns * self.block)) * self.block
        self.capacity = min(self.capacity, columns // self.block * self.block)
        self.basis = torch.empty((self.capacity, columns), device=start.device, dtype=torch.float32)
        self.basis[: self.block] = delta.agree(start)
        self.size = self.block
        self.projected = torch.zeros((0, 0), dtype=torch.float64, device=start.device)
        self.left: list[Tensor] | None = []
        self._bound_left()
        self.energy = math.nan

    def run(self, tol: float, negligible: float, max_steps: int) -> Triplets:
        for step in range(1, max_steps + 1):
            remainder = self._multiply()
            if self.energy <= negligible:
                return self._nothing()
            ritz = self._ritz(remainder)
            converged = ritz.residual < tol and ritz.worst < DIRECTION_TOLERANCE * tol
            if converged or step == max_steps:
                break
            if self.size == self.capacity:
                self._restart()
            self._append(remainder)
        return self._triplets(ritz, remainder, step, converged)

    def _multiply(self) -> Tensor:
        """Apply dW^T dW to the newest block, extend H, and return the part of the product outside the basis."""
        basis = self.basis[: self.size]
        product = self._gram_product(basis[-self.block :])
        cross = basis @ product.T
        old = self.size - self.block
        grown = torch.zeros((self.size, self.size), dtype=torch.float64, device=basis.device)
        grown[:old, :old] = self.projected
        grown[:, old:] = cross
        grown[old:, :] = cross.T
        grown[old:, old:] = (cross[old:] + cross[old:].T) / 2
        self.projected = grown
        return product.addmm_(cross.T, basis, alpha=-1)

    def _gram_product(self, block: Tensor) -> Tensor:
        """(dW^T dW block^T)^T in one pass; the first pass also measures dW and drops the rows that did not change."""
        rows, columns = self.delta.shape
        transposed = block.T.contiguous()
        left = None if self.left is None else torch.empty((rows, self.block), device=block.device, dtype=torch.float32)
        product = torch.zeros((self.block, columns), device=block.device, dtype=torch.float32)
        norms = torch.empty(rows, device=block.device, dtype=torch.float32) if math.isnan(self.energy) else None
        for part, tile in self.delta.tiles():
            image = torch.mm(tile, transposed, out=None if left is None else left[part])
            product.addmm_(image.T, tile)
            if norms is not None:
                torch.linalg.vector_norm(tile, dim=1, out=norms[part])
        if self.left is not None and left is not None:
            self.left.append(left)
            self._bound_left()
        if norms is not None:
            self._measure(norms)
        return self.delta.total(product)

    def _bound_left(self) -> None:
        """Stop keeping the products where one more would exceed the budget."""
        if self.left is not None:
            kept = sum(part.numel() for part in self.left) + self.delta.shape[0] * self.block
            self.left = None if 4 * kept > LEFT_BUDGET_BYTES else self.left

    @staticmethod
    def _combine(left: list[Tensor], vectors: Tensor) -> Tensor:
        """[left_1 left_2 ...] @ vectors without putting the parts together."""
        parts = vectors.split([part.shape[1] for part in left])
        total = left[0] @ parts[0]
        for product, weights in zip(left[1:], parts[1:], strict=True):
            total.addmm_(product, weights)
        return total

    def _measure(self, row_norms: Tensor) -> None:
        self.energy = self.delta.agree(self.delta.total(row_norms.double().square().sum())).item()
        if not math.isfinite(self.energy):
            raise NumericsError("dW contains NaN or Inf")
        changed = row_norms.nonzero().squeeze(1)
        if 0 < len(changed) < FEW_CHANGED_ROWS * len(row_norms):
            self.delta = self.delta.restrict(changed)
            self.left = [self.left[0][changed]] if self.left else None

    def _ritz(self, remainder: Tensor) -> "_Ritz":
        """The top k Ritz pairs within the dynamic range, and their residuals: only the newest block leaks out."""
        values, vectors = self._spectrum()
        values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
        count = min(self.k, int((values >= DYNAMIC_RANGE**2 * values[0]).sum()))
        next_s = values[count].sqrt().item() if count < len(values) else 0.0
        s, vectors = values[:count].sqrt(), vectors[:, :count]
        leak = self.delta.agree((vectors[-self.block :].float().T @ remainder).norm(dim=1).double() / s)
        return _Ritz(vectors, next_s, (leak.norm() / s.norm()).item(), (leak / s).max().item())

    def _spectrum(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues, ascending, and eigenvectors of H."""
        values, vectors = torch.linalg.eigh(self.projected)
        agreed = self.delta.agree(torch.cat([values[None], vectors]))
        return agreed[0], agreed[1:]

    def _restart(self) -> None:
        """Shrink the basis to its best half; the recurrence goes on from there as if nothing had happened."""
        keep = max(self.block, self.capacity // (2 * self.block) * self.block)
        values, vectors = self._spectrum()
        values, vectors = values[-keep:], vectors[:, -keep:].float()
        self.basis[:keep] = vectors.T @ self.basis[: self.size]
        self.projected = torch.diag(values)
        if self.left is not None:
            self.left = [self._combine(self.left, vectors)]
        self.size = keep

    def _append(self, remainder: Tensor) -> None:
        """Add the remainder as the next block; projected out again, as once leaves errors of the removed size."""
        basis = self.basis[: self.size]
        block = orthonormal_rows(remainder, rounds=1)
        block = orthonormal_rows(block.addmm_(block @ basis.T, basis, alpha=-1))
        self.basis[self.size : self.size + self.block] = self.delta.agree(block)
        self.size += self.block

    def _triplets(self, ritz: "_Ritz", remainder: Tensor, steps: int, converged: bool) -> Triplets:
        """U from dW V, then Vh anew from U^T dW = (dW^T dW V)^T: half a step that costs no pass and sharpens V."""
        vectors = ritz.vectors.float()
        image = self._image(vectors)
        product = (self.projected @ ritz.vectors).float().T @ self.basis[: self.size]
        product.addmm_(vectors[-self.block :].T, remainder)
        image = image.double()
        # dW V has nearly orthogonal columns within the dynamic range: its Gram matrix is as good as a QR.
        core = torch.linalg.cholesky(self.delta.total(image.T @ image))
        rows = torch.linalg.solve_triangular(core, product.double(), upper=False)
        p, s, vh = (self.delta.agree(part) for part in torch.linalg.svd(rows, full_matrices=False))
        q = torch.linalg.solve_triangular(core, image.T, upper=False).T
        u = self.delta.whole_rows((q @ p).float())
        return Triplets(u, s.float(), vh.float(), self.energy, ritz.next_s, ritz.residual, steps, converged)

    def _nothing(self) -> Triplets:
        (rows, columns), device = self.delta.whole_shape, self.basis.device
        u, s, vh = (torch.zeros(shape, device=device, dtype=torch.float32) for shape in ((rows, 0), 0, (0, columns)))
        return Triplets(u, s, vh, self.energy, 0.0, 0.0, 1, True)

    def _image(self, vectors: Tensor) -> Tensor:
        """dW V: from the products kept along the way, or by one more pass over dW."""
        if self.left is not None:
            return self._combine(self.left, vectors)
        right = (vectors.T @ self.basis[: self.size]).T.contiguous()
        image = torch.empty((self.delta.shape[0], right.shape[1]), device=right.device, dtype=torch.float32)
        for part, tile in self.delta.tiles():
            torch.mm(tile, right, out=image[part])
        return image


def orthonormal_rows(block: Tensor, rounds: int = 2) -> Tensor:
    """Orthonormal basis of the rows: Cholesky QR twice in float64, Householder QR where that is ill-conditioned."""
    work = block.double()
    for _ in range(rounds):
        factor, info = torch.linalg.cholesky_ex(work @ work.T)
        diagonal = factor.diagonal()
        if info.item() != 0 or not diagonal.min() > 1e-6 * diagonal.max():
            return torch.linalg.qr(block.double().T)[0].T.float().contiguous()
        work = torch.linalg.solve_triangular(factor, work, upper=False)
    return work.float()
