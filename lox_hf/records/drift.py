"""How far fine-tuning has moved a model along and away from its safety directions."""

import math
from dataclasses import dataclass
from typing import Any, Self

from lox_hf.records.base import JsonRecord


@dataclass(frozen=True)
class TensorDrift(JsonRecord):
    """Drift of one matrix.

    Attributes:
        name: Checkpoint name; one matrix of a stack reads `name[i]`.
        retention: <U_k^T (W - W_base) V_k, S_k> / ||S_k||^2: 1 for the aligned model, 1 + alpha after LoX, 0 when the
            safety component is erased; NaN where alignment did not change the matrix.
        r_ft: ||P_k (W - W_base)||_F / ||W - W_base||_F with P_k = U_k U_k^T of the alignment's change; NaN where it
            did not change the matrix, and where W equals W_base.
        r_align: The same of the aligned model itself.

    Example:
        >>> from lox_hf.records import TensorDrift
        >>> TensorDrift("lm_head.weight", retention=1.0, r_ft=0.5, r_align=0.5).retention
        1.0
    """

    name: str
    retention: float
    r_ft: float
    r_align: float


@dataclass(frozen=True)
class DriftReading(JsonRecord):
    """Drift of a whole model against its aligned and its base model.

    Attributes:
        retention: Retention of all matrices together: each one's weighted by its ||S_k||^2.
        r_ft: Mean of the matrices' r_ft, as the reference averages them, over those where it is not NaN.
        r_align: Mean of the r_align of the same matrices.
        ratio: r_ft / r_align; it falls as safety is lost. LoX raises r_ft by construction, so a rise after LoX is no
            evidence by itself.
        tensors: One record per matrix; empty where only the aggregate was kept.

    Example:
        >>> from lox_hf.records import DriftReading
        >>> DriftReading(retention=1.0, r_ft=0.3, r_align=0.3, ratio=1.0).ratio
        1.0

    Source: Perin et al., COLM 2025, section 3; the reference's safety/R_metrics.py.
    """

    retention: float = math.nan
    r_ft: float = math.nan
    r_align: float = math.nan
    ratio: float = math.nan
    tensors: tuple[TensorDrift, ...] = ()

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Build the reading with its nested records."""
        return super().from_dict({**data, "tensors": tuple(map(TensorDrift.from_dict, data.get("tensors", ())))})
