"""How far fine-tuning has moved a model along and away from its safety directions."""

import math
from dataclasses import dataclass, field
from typing import Any, Self

from lox_hf.records.base import JsonRecord
from lox_hf.records.safety import Rate


@dataclass(frozen=True)
class TensorDrift(JsonRecord):
    """Drift of one matrix.

    Attributes:
        name: Checkpoint name; one matrix of a stack reads `name[i]`.
        retention: <U_k^T (W - W_base) V_k, S_k> / ||S_k||^2: 1 for the aligned model, 1 + alpha after LoX, 0 when the
            safety component is erased; NaN where alignment did not change the matrix.
        r_ft: ||P_k (W - W_base)||_F / ||W - W_base||_F with P_k = U_k U_k^T of the alignment's change; NaN where it
            did not change the matrix, where W equals W_base, and where no base was read.
        r_align: The same of the aligned model itself.

    Example:
        >>> from lox_hf.records import TensorDrift
        >>> TensorDrift("lm_head.weight", retention=1.0, r_ft=0.5, r_align=0.5).retention
        1.0
    """

    name: str
    retention: float
    r_ft: float = math.nan
    r_align: float = math.nan


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


@dataclass(frozen=True)
class ProbeReading(JsonRecord):
    """What a model in training answered to a few prompts.

    Attributes:
        asr: Share of harmful prompts with which it complied.
        over_refusal: Share of harmless prompts that it refused.
        refusal_perplexity: Perplexity of a refusal as the answer to the harmful prompts; it rises, before answers
            change, as the model unlearns to refuse. NaN without harmful prompts.

    Example:
        >>> from lox_hf.statistics import rate
        >>> ProbeReading(asr=rate(1, 20), over_refusal=rate(0, 10), refusal_perplexity=1.8).asr.share
        0.05
    """

    asr: Rate
    over_refusal: Rate
    refusal_perplexity: float = math.nan

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Build the reading with its nested records."""
        rates = {name: Rate.from_dict(data[name]) for name in ("asr", "over_refusal")}
        return super().from_dict({**data, **rates})


@dataclass(frozen=True)
class TrainingReading(JsonRecord):
    """One look at a model in training.

    Attributes:
        step: Optimiser steps so far.
        epoch: Epochs so far.
        moment: Why it was taken: "begin", "step", "epoch", "evaluate", "save" or "end".
        drift: How far the weights have moved.
        probe: What it answered; None where no prompts are asked.
        reapplied: Size of the correction that was added after this reading, ||correction||_F / ||S_k||_F over all
            matrices: 1 is as much as alignment's own component. 0 where nothing was added.
        retention_after: Retention with the correction; NaN where nothing was added.
        tripped: Whether the watched figure was beyond its threshold.

    Example:
        >>> from lox_hf.records import DriftReading, TrainingReading
        >>> TrainingReading(50, 0.5, "step", DriftReading(retention=0.9)).figures()
        {'retention': 0.9}
    """

    step: int
    epoch: float
    moment: str
    drift: DriftReading = field(default_factory=DriftReading)
    probe: ProbeReading | None = None
    reapplied: float = 0.0
    retention_after: float = math.nan
    tripped: bool = False

    def figures(self) -> dict[str, float]:
        """Return what was measured, by the names that thresholds and logs use; nothing that was not."""
        found = {name: getattr(self.drift, name) for name in ("retention", "r_ft", "r_align", "ratio")}
        if self.probe is not None:
            found |= {"asr": self.probe.asr.share, "over_refusal": self.probe.over_refusal.share}
            found["refusal_perplexity"] = self.probe.refusal_perplexity
        if self.reapplied:
            found |= {"reapplied": self.reapplied, "retention_after": self.retention_after}
        return {name: value for name, value in found.items() if not math.isnan(value)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Build the reading with its nested records."""
        probe = data.get("probe")
        nested = {
            "drift": DriftReading.from_dict(data.get("drift", {})),
            "probe": ProbeReading.from_dict(probe) if probe else None,
        }
        return super().from_dict({**data, **nested})
