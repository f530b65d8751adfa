"""Directions that were found before, as a source of them for an edit."""

from collections.abc import Mapping

from torch import Tensor

from lox_hf.config import LoxConfig
from lox_hf.core.delta import Delta
from lox_hf.core.lowrank import Decomposition, LowRank
from lox_hf.edit.tensor import Piece, matrix_names
from lox_hf.errors import ConfigError, PairingError, listing
from lox_hf.records import HardeningReport, TensorPlan, TensorReport
from lox_hf.weights.identity import weights_sample
from lox_hf.weights.selection import get_pattern_value, matrix_shape, module_name
from lox_hf.weights.source import WeightSource


class SubspaceFactors:
    """Directions read from a saved subspace: nothing is decomposed.

    Args:
        factors: By matrix name.
        config: The settings they were made with.
        report: What is known about each.
    """

    def __init__(self, factors: Mapping[str, LowRank], config: LoxConfig, report: HardeningReport) -> None:
        self.factors, self.config, self.reference = factors, config, report.base
        self._reports = {item.name: item for item in report.tensors}

    def check(self, aligned: WeightSource, plans: list[TensorPlan], config: LoxConfig) -> None:
        """Raise with all tensors that the subspace does not hold, or holds in another shape or a lower rank."""
        problems = [problem for plan in plans if plan.edit for problem in self._problems(plan)]
        if problems:
            raise PairingError(
                f"The subspace does not fit {aligned.label}: {len(problems)} matrices differ. {listing(problems)} "
                f"It was made with r = {self.config.r}: ask for no more, or make it again."
            )

    def prefetch(self, name: str) -> None:
        """Do nothing: the factors are in memory."""

    def release(self, name: str) -> None:
        """Do nothing: the factors stay."""

    def identity(self) -> str:
        """Hash of numbers of every right factor."""
        return weights_sample((name, item.Vh) for name, item in self.factors.items())

    def delta(self, plan: TensorPlan, number: int, aligned: Tensor | Piece) -> Delta:
        """Refuse: a subspace does not hold the whole of dW."""
        raise ConfigError(f"{plan.name}: the full rank (r=None) needs the base model, a subspace does not hold it.")

    def find(self, plan: TensorPlan, number: int, aligned: Tensor | Piece) -> Decomposition:
        """Return the top r of the stored directions."""
        name = matrix_names(plan.name, plan.shape)[number]
        stored, report = self.factors[name], self._reports[name]
        k = stored.rank_for(plan.r, report.delta_norm**2)
        cut = stored.truncate(k)
        next_s = stored.S[k].item() if k < stored.rank else _next_s(report)
        method = "subspace" if stored.rank else "zero"
        return Decomposition(cut.to(aligned.device), report.delta_norm**2, next_s, report.residual, 0, method)

    def _problems(self, plan: TensorPlan) -> list[str]:
        if plan.r is None:
            return [f"{plan.name}: the full rank (r=None) needs the base model"]
        problems = []
        for name, shape in zip(matrix_names(plan.name, plan.shape), _matrix_shapes(plan), strict=True):
            stored = self.factors.get(name)
            if stored is None:
                problems.append(f"{name}: not in the subspace")
            elif stored.shape != shape:
                problems.append(f"{name}: {shape} against {stored.shape}")
            elif not self._deep_enough(plan.name, stored, self._reports[name], plan.r):
                problems.append(f"{name}: r = {plan.r} against {stored.rank} stored directions")
        return problems

    def _deep_enough(self, name: str, stored: LowRank, report: TensorReport, r: int | float) -> bool:
        made = self.config
        asked = get_pattern_value(made.rank_pattern, module_name(name), made.r)
        complete = isinstance(asked, int) and stored.rank < asked  # dW has no more directions than these
        if isinstance(r, int):
            return r <= stored.rank or complete or stored.rank in (0, min(stored.shape))
        return complete or stored.rank == 0 or report.energy_share >= r * (1 - 1e-6)


def _matrix_shapes(plan: TensorPlan) -> list[tuple[int, int]]:
    _, rows, columns = matrix_shape(plan.shape)
    return [(rows, columns)] * len(matrix_names(plan.name, plan.shape))


def _next_s(report: TensorReport) -> float:
    """s_(k+1) back from the gap (s_k - s_(k+1)) / s_1."""
    if not report.singular_values or report.gap != report.gap:
        return 0.0
    return max(0.0, report.singular_values[-1] - report.gap * report.singular_values[0])
