"""Pairs of matrices whose difference has a known spectrum."""

import torch
from torch import Tensor


def pair(
    shape: tuple[int, int],
    values: list[float],
    *,
    noise: float = 0.0,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Aligned and base: weights of std 0.02, a change with these singular values, and noise on top."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = shape
    base = 0.02 * torch.randn(shape, generator=generator)
    left, right = (torch.linalg.qr(torch.randn(size, len(values), generator=generator))[0] for size in shape)
    change = (left * torch.tensor(values)) @ right.T + noise * torch.randn(rows, columns, generator=generator)
    return (base + change).to(dtype), base.to(dtype)


def edge(shape: tuple[int, int], noise: float) -> float:
    """Largest singular value of the noise alone."""
    return noise * (shape[0] ** 0.5 + shape[1] ** 0.5)


def exact(aligned: Tensor, base: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Float64 SVD of the difference, the yardstick."""
    return torch.linalg.svd(aligned.double() - base.double(), full_matrices=False)


def projector_error(found: Tensor, wanted: Tensor) -> float:
    """||P - P'||_2 for two orthonormal bases of equal size: the sine of the largest angle between their spans."""
    found, wanted = found.double(), wanted.double()
    return torch.linalg.matrix_norm(found - wanted @ (wanted.T @ found), 2).item()
