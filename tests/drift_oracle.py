"""The drift metrics in float64, written from the paper's definitions, and models to read them on.

With dW = W_aligned - W_base, its top k singular directions U, S, V and P = U U^T:
retention = <U^T (W - W_base) V, S> / ||S||^2, R_ft = ||P (W - W_base)|| / ||W - W_base||, R_align = ||P dW|| / ||dW||.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean

import numpy as np
import torch

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Expected:
    """Retention of all matrices together and the means of their shares."""

    retention: float
    r_ft: float
    r_align: float


def expected_drift(weights: Tensors, aligned: Tensors, base: Tensors, k: int, names: Iterable[str]) -> Expected:
    """Apply the definitions to the named tensors; one of three dims is a stack of matrices."""
    component, reference, r_ft, r_align = 0.0, 0.0, [], []
    for name in names:
        for weight, ours, theirs in zip(*map(_stack, (weights[name], aligned[name], base[name])), strict=True):
            change, alignment = weight - theirs, ours - theirs
            left, s, right = (part[..., :k] for part in _svd(alignment))
            component += ((left.T @ change @ right) * torch.diag(s)).sum().item()
            reference += s.square().sum().item()
            projector = left @ left.T
            r_ft.append(((projector @ change).norm() / change.norm()).item())
            r_align.append(((projector @ alignment).norm() / alignment.norm()).item())
    return Expected(component / reference, fmean(r_ft), fmean(r_align))


def erase(aligned: Tensors, base: Tensors, k: int, share: float) -> dict[str, torch.Tensor]:
    """Take this share of the component along the top k directions out of every tensor of two or three dims."""
    return {
        name: _erased(tensor, base[name], k, share).to(tensor.dtype) if tensor.ndim in (2, 3) else tensor
        for name, tensor in aligned.items()
    }


def fine_tune(aligned: Tensors, base: Tensors, seed: int = 0) -> dict[str, torch.Tensor]:
    """Change every weight as a fine-tuning might: half of its alignment undone, and as much again of noise.

    Made of NumPy's seeded integers and exact arithmetic like the zoo, so the same on every machine.
    """
    return {name: _tuned(name, tensor, base[name], seed) for name, tensor in aligned.items()}


def _tuned(name: str, aligned: torch.Tensor, base: torch.Tensor, seed: int) -> torch.Tensor:
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    change = (aligned.double() - base.double()).numpy()
    largest = float(np.abs(change).max())
    moved = aligned.double().numpy() - 0.5 * change + (rng.random(change.shape) - 0.5) * largest
    return torch.from_numpy(moved).to(aligned.dtype)


def _erased(aligned: torch.Tensor, base: torch.Tensor, k: int, share: float) -> torch.Tensor:
    left, s, right = (part[..., :k] for part in _svd(aligned.double() - base.double()))
    return aligned.double() - share * (left * s[..., None, :]) @ right.mT


def _svd(delta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    left, s, right = torch.linalg.svd(delta, full_matrices=False)
    return left, s, right.mT


def _stack(tensor: torch.Tensor) -> torch.Tensor:
    exact = tensor.double()
    return exact if exact.ndim == 3 else exact[None]
