"""Where a change of one matrix lies: along the safety directions, within their span, and outside it."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lox_hf.core.buffers import scratch
from lox_hf.core.delta import Delta, tile_slices
from lox_hf.core.lowrank import LowRank
from lox_hf.errors import NumericsError


@dataclass(frozen=True)
class Projection:
    """A change dW = W - W_base against the directions U_k, S_k, V_k of the change that alignment made.

    Attributes:
        component: <U_k^T dW V_k, S_k> = sum_i s_i u_i^T dW v_i: how far dW goes along the alignment's change.
        reference: ||S_k||_F^2, the component of the alignment's change itself; 0 where there are no directions.
        projected_norm: ||U_k^T dW||_F = ||P_k dW||_F with P_k = U_k U_k^T.
        norm: ||dW||_F.
    """

    component: float
    reference: float
    projected_norm: float
    norm: float

    @property
    def retention(self) -> float:
        """<U_k^T dW V_k, S_k> / ||S_k||_F^2: 1 for the alignment's change, 0 for dW = 0; NaN without directions."""
        return self.component / self.reference if self.reference > 0 else math.nan

    @property
    def share(self) -> float:
        """R = ||P_k dW||_F / ||dW||_F, in [0, 1]; NaN for dW = 0, which points nowhere, and without directions."""
        return min(1.0, self.projected_norm / self.norm) if self.norm > 0 and self.reference > 0 else math.nan


@torch.no_grad()
def coordinates(weight: Tensor, directions: LowRank) -> Tensor:
    """Return U_k^T W V_k, where a matrix stands within the directions: float32 tiles, sums over them in float64.

    Of two matrices the difference of these is U_k^T (W - W') V_k: so retention needs no base, only its coordinates.

    Args:
        weight: W, (m, n), any floating dtype, or rows and columns of it with directions cut to the same.
        directions: U_k (m, k) and V_k^T (k, n); k may be 0. On any device.

    Returns:
        (k, k), float64 on the CPU.

    Raises:
        NumericsError: If W contains NaN or Inf.

    Example:
        >>> import torch
        >>> from lox_hf.core.lowrank import LowRank
        >>> axes = LowRank(torch.eye(3)[:, :2], torch.ones(2), torch.eye(2))
        >>> coordinates(torch.tensor([[2.0, 1.0], [0.0, 3.0], [9.0, 9.0]]), axes)
        tensor([[2., 1.],
                [0., 3.]], dtype=torch.float64)
    """
    left = directions.U.to(weight.device)
    within = _zeros((directions.rank, weight.shape[1]), weight.device)
    for part in tile_slices(*weight.shape, device=weight.device):
        rows = weight[part]
        if rows.dtype != torch.float32:
            rows = scratch("delta", rows.shape, torch.float32, rows.device).copy_(rows)
        within += (left[part].T @ rows).to(within.device)
    found = (within @ directions.Vh.to(within.device).double().T).cpu()
    if not torch.isfinite(found).all():
        raise NumericsError("W contains NaN or Inf")
    return found


@torch.no_grad()
def project(delta: Delta, directions: LowRank) -> Projection:
    """Measure dW against the directions in one pass: float32 tiles, sums over them in float64.

    Args:
        delta: dW of a model to the base, (m, n), all rows.
        directions: U_k (m, k), S_k and V_k^T (k, n) of the alignment's change; k may be 0. On any device.

    Returns:
        The component along the directions, the norm within their span, and the norm of all of dW.

    Raises:
        NumericsError: If dW contains NaN or Inf.

    Example:
        >>> import torch
        >>> from lox_hf.core.lowrank import decompose
        >>> base, aligned = torch.zeros(3, 2), torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
        >>> directions = decompose(Delta(aligned, base), 1).factors
        >>> tuned = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
        >>> found = project(Delta(tuned, base), directions)
        >>> round(found.retention, 4), round(found.share, 4)
        (0.5, 0.7071)

    Source: Perin et al., COLM 2025, section 3 (R_align and R_ft).
    """
    left = directions.U.to(delta.device)
    within = _zeros((directions.rank, delta.shape[1]), delta.device)
    energy = _zeros((), delta.device)
    for part, tile in delta.tiles():
        within += (left[part].T @ tile).to(within.device)
        energy += torch.linalg.vector_norm(tile, dim=1).to(energy.device).double().square().sum()
    if not torch.isfinite(energy):
        raise NumericsError("dW contains NaN or Inf")
    along = (within * directions.Vh.to(within.device)).sum(dim=1).cpu()
    s = directions.S.double().cpu()
    return Projection(
        component=(along @ s).item(),
        reference=s.square().sum().item(),
        projected_norm=within.norm().item(),
        norm=energy.sqrt().item(),
    )


def _zeros(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Where sums of a device's float32 products begin, in float64: on the CPU where the device has none, as MPS."""
    return torch.zeros(shape, dtype=torch.float64, device="cpu" if device.type == "mps" else device)
