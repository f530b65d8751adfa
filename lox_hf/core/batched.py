"""Block Lanczos on many matrices of one shape at once, for accelerators: few large products instead of many small.

The recurrence, the certificate and the tolerances are those of `lanczos`. What is different: dW is there as a whole,
in float32; every matrix takes the same steps; and the host learns of a step by one copy of the small matrices. What
does not fit that (a spectrum that spans too many orders, slow convergence, NaN) is left to `lowrank.decompose`.
"""

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from lox_hf.core.lanczos import DIRECTION_TOLERANCE, DYNAMIC_RANGE, Triplets, block_size
from lox_hf.core.precision import exact_products

MAX_STEPS = 40
FIRST_TEST = 3
"""Step of the first look at the residual: from a random start no change with more directions than a block is found
before."""
BASIS_BLOCKS = 10
"""Blocks at which the Krylov basis is restarted: it bounds the memory, and the small problems that the host solves."""
SHIFT = 1e-13
"""Share of its trace that is added to a Gram matrix, so that its Cholesky factor exists whatever the rows are."""
FILL = 1e-8
"""Share of random rows that is added to a new block, so that it has full rank where the change has not."""


def batch_bytes(shape: tuple[int, int], k: int) -> int:
    """Memory that one matrix takes in a batch: dW twice, bases and blocks.

    The stack of dW is held to the end, and the halves that are cut from it as matrices are finished add up to as much.

    Args:
        shape: (m, n).
        k: Number of directions.

    Returns:
        Bytes.
    """
    return 8 * math.prod(shape) + sum(shape) * block_size(k) * (8 * BASIS_BLOCKS + 64)


@torch.no_grad()
def batched_lanczos(deltas: Tensor, k: int, *, tol: float = 1e-4, seed: int = 0) -> list[Triplets | None]:
    """Find the top k singular triplets of each dW to a residual below `tol`.

    Args:
        deltas: dW of every matrix, (count, m, n) float32.
        k: Number of directions; `lowrank.fits` tells whether the shape allows it.
        tol: Stop when the residual (see `Triplets`) is below this, and that of each direction below ten times this.
        seed: Seed of the random start block, the same for all.

    Returns:
        The triplets of each matrix; None where it has to be decomposed alone.

    Example:
        >>> deltas = torch.randn(3, 96, 80, generator=torch.Generator().manual_seed(0))
        >>> found = batched_lanczos(deltas, 2)
        >>> [len(triplets.s) for triplets in found]
        [2, 2, 2]
    """
    with exact_products(), _Eigensolver() as eigen:
        return _Batch(deltas, k, seed, eigen).run(tol)


@dataclass(frozen=True)
class _Ritz:
    """Approximate eigenpairs of the active matrices, best first, on the host, and how good the top k are."""

    values: Tensor
    vectors: Tensor
    residual: Tensor
    converged: Tensor
    complete: Tensor


class _Batch:
    """Bases Q (rows), products Q dW^T (rows) and projections H = Q dW^T dW Q^T of all matrices of a batch.

    `numbers` says which matrices are held, `active` which of those held are not finished; the others ride along.
    """

    def __init__(self, deltas: Tensor, k: int, seed: int, eigen: "_Eigensolver") -> None:
        count, rows, columns = deltas.shape
        self.deltas, self.k, self.block, self.eigen = deltas, k, block_size(k), eigen
        self.capacity = min(BASIS_BLOCKS, columns // self.block) * self.block
        self.basis = deltas.new_empty((count, self.capacity, columns))
        self.left = deltas.new_empty((count, self.capacity, rows))
        self.projected = deltas.new_zeros((count, self.capacity, self.capacity), dtype=torch.float64)
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn((2, self.block, columns), generator=generator, device="cpu", dtype=torch.float32)
        start, fill = drawn.to(deltas.device)
        self.basis[:, : self.block] = orthonormal_blocks(start[None], rounds=2)[0].float()
        self.fill = FILL * fill.double() / math.sqrt(fill.numel())
        self.size = self.block
        energies = torch.linalg.vector_norm(deltas, dim=2).double().square().sum(dim=1).tolist()
        self.energies: list[float] = energies
        self.results: list[Triplets | None] = [self._nothing() if energy == 0 else None for energy in energies]
        self.numbers = list(range(count))
        self.active = [number for number in self.numbers if math.isfinite(energies[number]) and energies[number] > 0]

    def run(self, tol: float) -> list[Triplets | None]:
        for step in range(1, MAX_STEPS + 1):
            if not self.active:
                break
            remainder = self._multiply()
            if step >= FIRST_TEST:
                ritz = self._ritz(remainder, tol)
                if self.active:
                    self._finish(ritz, remainder, step)
                    self._restart(ritz)
                    remainder = self._narrow(ritz, remainder)
            self._append(remainder)
        return self.results

    def _multiply(self) -> Tensor:
        """Apply dW^T dW to the newest blocks, extend H, and return the parts of the products outside the bases."""
        new = slice(self.size - self.block, self.size)
        image = torch.bmm(self.basis[:, new], self.deltas.mT)
        self.left[:, new] = image
        product, basis = torch.bmm(image, self.deltas), self.basis[:, : self.size]
        cross = torch.bmm(basis, product.mT)
        self.projected[:, : self.size, new] = cross.double()
        self.projected[:, new, : self.size] = cross.mT.double()
        corner = self.projected[:, new, new]
        self.projected[:, new, new] = (corner + corner.mT) / 2
        return product.baddbmm_(cross.mT, basis, alpha=-1)

    def _ritz(self, remainder: Tensor, tol: float) -> _Ritz:
        """Ritz pairs and residuals of the active matrices: the step's only copy to the host, and its only wait."""
        wide = remainder.double()
        leak = torch.nn.functional.pad(torch.bmm(wide, wide.mT), (0, self.size - self.block))
        host = torch.cat([self.projected[:, : self.size, : self.size], leak], dim=1).cpu()
        finite = host.isfinite().all(dim=2).all(dim=1).tolist()
        self.active = [place for place in self.active if finite[place]]  # what overflows is left to be refused by name
        host = host[self.active]
        values, vectors = self.eigen.pairs(host[:, : self.size])
        solved = values.isfinite().all(dim=1)
        self.active = [place for place, good in zip(self.active, solved.tolist(), strict=True) if good]
        host, values, vectors = host[solved], values[solved], vectors[solved]
        top, newest = values[:, : self.k], vectors[:, -self.block :, : self.k]
        within = top >= DYNAMIC_RANGE**2 * top[:, :1]
        leaks = (newest * (host[:, self.size :, : self.block] @ newest)).sum(dim=1).clamp_min(0) * within
        s = top.sqrt() * within
        of_all = (leaks / top.clamp_min(1e-300)).sum(dim=1).sqrt() / s.norm(dim=1)
        of_each = leaks.sqrt() / top.clamp_min(1e-300)
        converged = (of_all < tol) & (of_each.amax(dim=1) < DIRECTION_TOLERANCE * tol)
        return _Ritz(values, vectors, of_all, converged, within.all(dim=1))

    def _finish(self, ritz: _Ritz, remainder: Tensor, step: int) -> None:
        """Keep the triplets of what has converged; where the spectrum is too wide for one run they stay unknown."""
        done = (ritz.converged & ritz.complete).nonzero().squeeze(1).tolist()
        if not done:
            return
        places = self._on_device([self.active[item] for item in done])
        parts = self._triplets(ritz.vectors[done][:, :, : self.k], places, remainder.index_select(0, places))
        solved = parts[1].isfinite().all(dim=1).tolist()
        for item, good, u, s, vh in zip(done, solved, *parts, strict=True):
            if not good:
                continue
            number = self.numbers[self.active[item]]
            next_s = ritz.values[item, self.k].sqrt().item()
            residual = ritz.residual[item].item()
            # Copies, so that what is kept of one matrix does not keep all of them.
            self.results[number] = Triplets(
                u.clone(), s.clone(), vh.clone(), self.energies[number], next_s, residual, step, True
            )

    def _triplets(self, vectors: Tensor, places: Tensor, remainder: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """U from dW V, then Vh anew from U^T dW = (dW^T dW V)^T, as `lanczos` does, but by Gram matrices."""
        vectors = vectors.to(self.basis.device)
        projected = self.projected[:, : self.size, : self.size].index_select(0, places)
        image = torch.bmm(vectors.mT.float(), self.left[:, : self.size].index_select(0, places))
        product = torch.bmm((projected @ vectors).mT.float(), self.basis[:, : self.size].index_select(0, places))
        product.baddbmm_(vectors[:, -self.block :].mT.float(), remainder)
        q, inverse = orthonormal_blocks(image, rounds=2)
        rows = torch.bmm(inverse, product.double())
        values, turn = (part.to(rows.device) for part in self.eigen.pairs(torch.bmm(rows, rows.mT).cpu()))
        s = values.sqrt()
        vh = torch.bmm(turn.mT, rows) / s[:, :, None]
        return torch.bmm(q.mT, turn).float(), s.float(), vh.float()

    def _restart(self, ritz: _Ritz) -> None:
        """Shrink full bases to their best half; what is finished gets an empty one, which nobody reads."""
        if self.size < self.capacity:
            return
        keep = max(self.block, self.capacity // (2 * self.block) * self.block)
        places = self._on_device(self.active)
        vectors = self.projected.new_zeros((len(self.numbers), self.size, keep))
        vectors[places] = ritz.vectors[:, :, :keep].to(vectors.device)
        values = self.projected.new_zeros((len(self.numbers), keep))
        values[places] = ritz.values[:, :keep].to(values.device)
        turn = vectors.mT.float()
        self.basis[:, :keep] = torch.bmm(turn, self.basis)
        self.left[:, :keep] = torch.bmm(turn, self.left)
        self.projected.zero_()
        self.projected[:, :keep, :keep] = torch.diag_embed(values)
        self.size = keep

    def _narrow(self, ritz: _Ritz, remainder: Tensor) -> Tensor:
        """Strike out what is finished, and let go of it once that is half of the batch."""
        self.active = [place for place, done in zip(self.active, ritz.converged.tolist(), strict=True) if not done]
        if 2 * len(self.active) > len(self.numbers) or not self.active:
            return remainder
        places = self._on_device(self.active)
        self.deltas, self.basis, self.left, self.projected, remainder = (
            part.index_select(0, places) for part in (self.deltas, self.basis, self.left, self.projected, remainder)
        )
        self.numbers = [self.numbers[place] for place in self.active]
        self.active = list(range(len(self.active)))
        return remainder

    def _append(self, remainder: Tensor) -> None:
        """Add the remainders as the next blocks, of full rank, and orthogonal to the bases."""
        basis, wide = self.basis[:, : self.size], remainder.double()
        largest = wide.abs().amax(dim=(1, 2), keepdim=True)  # first, so that squares do not vanish
        wide = wide / torch.where(largest > 0, largest, 1.0)
        norm = wide.flatten(1).norm(dim=1)[:, None, None]
        block = orthonormal_blocks(wide / norm.clamp_min(1.0) + self.fill, rounds=3)[0].float()
        for _ in range(2):  # directions that were small before are not clean after one
            block = block.baddbmm(torch.bmm(block, basis.mT), basis, alpha=-1)
            block = orthonormal_blocks(block, rounds=2)[0].float()
        self.basis[:, self.size : self.size + self.block] = block
        self.size += self.block

    def _nothing(self) -> Triplets:
        _, rows, columns = self.deltas.shape
        u, s, vh = (self.deltas.new_zeros(shape) for shape in ((rows, 0), 0, (0, columns)))
        return Triplets(u, s, vh, 0.0, 0.0, 0.0, 1, True)

    def _on_device(self, places: list[int]) -> Tensor:
        return torch.tensor(places, device=self.basis.device)


def orthonormal_blocks(blocks: Tensor, rounds: int) -> tuple[Tensor, Tensor]:
    """Orthonormal bases of the rows of each block by shifted Cholesky QR: no block makes the host wait.

    Method: Fukaya, Kannan, Nakatsukasa, Yamamoto, Yanagisawa, "Shifted Cholesky QR for computing the QR factorization
    of ill-conditioned matrices" (SIAM J. Sci. Comput. 42, 2020).

    Args:
        blocks: (count, b, n), b at most n.
        rounds: 2 suffice up to a condition of about 10^6, 3 up to 10^8.

    Returns:
        The bases (count, b, n), and the lower triangular (count, b, b) that turn the blocks into them; float64.
    """
    work = blocks.double()
    eye = torch.eye(work.shape[1], dtype=work.dtype, device=work.device)
    total = eye.expand(len(work), -1, -1)
    for _ in range(rounds):
        gram = torch.bmm(work, work.mT)
        trace = gram.diagonal(dim1=1, dim2=2).sum(dim=1)[:, None, None]
        factor, _ = torch.linalg.cholesky_ex(gram + SHIFT * trace * eye)
        inverse = torch.linalg.solve_triangular(factor, eye.expand_as(factor), upper=False)
        work, total = torch.bmm(inverse, work), torch.bmm(inverse, total)
    return work, total


class _Eigensolver:
    """The small problems, on the CPU: LAPACK takes one at a time, hence a share a thread, for as long as the block."""

    def __init__(self) -> None:
        self._threads = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(self._threads, initializer=torch.set_num_threads, initargs=(1,))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()
        torch.set_num_threads(self._threads)  # threads that begin later take the number that was set last, by any

    def pairs(self, matrices: Tensor) -> tuple[Tensor, Tensor]:
        """Eigenpairs, largest first and none negative; NaN where LAPACK does not converge."""
        solved = list(self._pool.map(_eigh, matrices.chunk(self._threads)))
        values, vectors = (torch.cat(parts) for parts in zip(*solved, strict=True))
        return values.flip(1).clamp_min(0), vectors.flip(2)


def _eigh(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenpairs, ascending; where one of several fails each is taken alone, so that it harms nobody."""
    try:
        return torch.linalg.eigh(matrices)
    except torch.linalg.LinAlgError:
        if len(matrices) == 1:
            return matrices.new_full(matrices.shape[:2], math.nan), torch.full_like(matrices, math.nan)
        values, vectors = zip(*map(_eigh, matrices.split(1)), strict=True)
        return torch.cat(values), torch.cat(vectors)
