"""The rank curve: safety of the base with more and more directions of the change that alignment made."""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from lox_hf.analysis.directions import base_of, check_same_models, find_directions
from lox_hf.analysis.effective_rank import effective_rank, too_few
from lox_hf.analysis.formed import FormedModel, of_live_weights
from lox_hf.analysis.points import PointJob, ScoreFn, identity, measured, with_dtype
from lox_hf.config import ALL_LINEAR, LoxConfig
from lox_hf.edit.tensor import matrix_names
from lox_hf.errors import ConfigError, PairingError, listing
from lox_hf.inputs import ModelLike, Pair, open_pair
from lox_hf.jobs import Runner
from lox_hf.records import CurvePoint, EffectiveRank, RankCurve, Score
from lox_hf.run_folder import RunFolder
from lox_hf.subspace import SafetySubspace
from lox_hf.version import versions
from lox_hf.weights.live import linear_modules
from lox_hf.weights.selection import why_left_out
from lox_hf.weights.source import WeightSource

RANKS = (0, 1, 2, 3, 4, 6, 8)
RHO = 0.01
RECORD_NAME = "rank_curve.json"
RUN = {"run": "rank curve"}
"""What the run's folder is for; what every point depends on stands with the point."""
NOT_OF_A_POINT = (
    *("base_model_name_or_path", "revision", "r", "rank_pattern", "alpha", "alpha_pattern", "allow_negative_alpha"),
)
"""Settings that say nothing about a point: the models are known by their weights, and the rank is its own."""

MODULE_ENDS = re.compile(r"\.(weight|bias)$")


def rank_curve(
    model: nn.Module,
    base_model: ModelLike | None,
    score_fn: ScoreFn,
    config: LoxConfig | None = None,
    *,
    ranks: Sequence[int] = RANKS,
    aligned_model: ModelLike | None = None,
    subspace: SafetySubspace | None = None,
    reset_vectors: bool = False,
    measure: str = "asr",
    rho: float = RHO,
    about: dict[str, Any] | None = None,
    output_dir: str | Path | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    trust_remote_code: bool = False,
    progressbar: bool | None = None,
) -> RankCurve:
    """Measure W_base + Proj_r(dW) at several ranks r, and read the effective rank off them (paper, section 3).

    dW is decomposed once, at the largest rank. Every point is formed in the loaded model, tile by tile and in float32,
    so that no second model is in memory; its weights are back bit for bit at the end, however it ends. A matrix whose
    smaller side is at most r has its aligned weight, as everything that `config` does not select.

    Args:
        model: The loaded aligned model.
        base_model: The model before alignment: folder, Hub id, loaded model or state dict; None takes what `config`
            or the aligned model's own files name.
        score_fn: Measures the model: returns a record, a rate or a number, and leaves the weights as they are.
        config: Which tensors are taken back to the base, and how dW is decomposed; `r` and `alpha` are not used. None
            takes the settings of `subspace`, else every tensor with two or more dims.
        ranks: The ranks, each 0 (the base) or more.
        aligned_model: Folder or Hub id of `model`, from which its weights are read again; None keeps a copy of them.
        subspace: Directions that were found before, with `r` at least the largest rank; None finds them.
        reset_vectors: At r = 0 take weights with fewer than two dims of the selected modules from the base too, as the
            reference does.
        measure: The rate, one that alignment lowers, from which the effective rank is read.
        rho: How far above the aligned model's rate counts as equal, in (0, 1); the paper's is 0.01.
        about: Settings of the measure, as JSON values: a point that was measured with others is not read again. The
            dtype of the loaded model is one of them in any case.
        output_dir: Folder of the run: `rank_curve.json`, every point, and the directions. A killed run goes on there,
            and a finished one takes further ranks. None keeps everything in memory.
        revision: Revision of `aligned_model` on the Hub.
        token: Hub token; None uses the stored login.
        trust_remote_code: Run modelling code of the aligned model's repository where "all-linear" needs it.
        progressbar: Show progress bars; None shows them on a terminal only.

    Returns:
        The curve.

    Raises:
        ConfigError: If a setting is out of range, no base is named, or `score_fn` returns nothing that can be read.
        PairingError: If the models or the subspace do not fit together.
        CheckpointError: If files are missing or damaged.
        UnsupportedModelError: If weights are quantised, offloaded or sharded.
        NumericsError: If a matrix contains NaN or Inf; it is named.
        OutputError: If the folder holds something else or points of another run, or cannot be written.

    Example:
        >>> import torch
        >>> aligned, base = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
        >>> curve = rank_curve(aligned, base, lambda model: model(torch.ones(8)).norm().item(), ranks=(0, 1, 8))
        >>> [point.r for point in curve.points], curve.matrices
        ([0, 1, 8], 1)
        >>> abs(curve.points[-1].score.value("value") - curve.aligned_score.value("value")) < 1e-5
        True

    Source: Perin et al., COLM 2025, section 3; the reference's safety/effective_rank.py.
    """
    ranks = _checked(ranks, rho, config)
    config = config or (LoxConfig() if subspace is None else subspace.config)
    config = replace(config, r=max(1, *ranks), rank_pattern=None)
    folder = RunFolder(output_dir, RUN)
    folder.check()
    pair = open_pair(
        model if aligned_model is None else aligned_model,
        base_model,
        config,
        revision=revision,
        token=token,
        trust_remote_code=trust_remote_code,
        allow_repeat=True,
    )
    base_of(pair)
    formed = FormedModel(model, aligned_model, revision=revision, token=token)
    pair = of_live_weights(pair, formed)
    if subspace is not None:
        check_same_models(subspace, pair)
    settings = with_dtype(about, model)
    points = _Points(formed, pair, score_fn, reset_vectors, settings)
    with folder, formed.restored_afterwards():
        runner: Runner[Score] = Runner(folder, progressbar=progressbar)
        jobs = points.jobs(ranks)
        for job in jobs:
            runner.kept(job)  # results with other settings are refused before any work
        points.directions = subspace or find_directions(pair, folder, progressbar)
        aligned_score, *scores = runner.results(jobs, "Measuring ranks", "model")
        measured_points = tuple(map(CurvePoint, ranks, map(points.energy_share, ranks), scores))
        effective, warnings = _reading(measured_points, aligned_score, measure, rho)
        found = RankCurve(
            aligned=pair.aligned.reference,
            base=pair.factors.reference,
            config=pair.config.to_dict(),
            points=measured_points,
            aligned_score=aligned_score,
            matrices=len(points.matrices),
            reset_vectors=reset_vectors,
            effective=effective,
            about=settings,
            versions=versions("transformers"),
            warnings=warnings,
        )
        folder.write(RECORD_NAME, found.to_json())
    return found


class _Points:
    """The models of the curve: how each is formed and measured, and what its result depends on.

    Args:
        formed: The place where they are formed.
        pair: The two models and the selection.
        score_fn: The measure.
        reset_vectors: Whether at r = 0 vectors of the selected modules are the base's too.
        about: Settings of the measure.

    Attributes:
        directions: The directions, at the largest rank; none is formed without them.
    """

    def __init__(
        self, formed: FormedModel, pair: Pair, score_fn: ScoreFn, reset_vectors: bool, about: dict[str, Any]
    ) -> None:
        self.formed, self.pair, self.score_fn, self.about = formed, pair, score_fn, about
        self.base = base_of(pair)
        self.directions: SafetySubspace | None = None
        edited = [plan for plan in pair.plans if plan.edit]
        self.names = [plan.name for plan in edited]
        self.matrices = [name for plan in edited for name in matrix_names(plan.name, plan.shape)]
        self.vectors = _vectors(pair, self.base, formed.model) if reset_vectors else []

    def jobs(self, ranks: Sequence[int]) -> list[PointJob]:
        """The aligned model first, while the model still is it; then the ranks."""
        aligned = identity(self.pair.aligned.source)
        settings = {name: value for name, value in self.pair.config.to_dict().items() if name not in NOT_OF_A_POINT}
        own = {"weights": {"aligned": aligned}, "measure": self.about}
        jobs = [PointJob("points/aligned.json", own, lambda: measured(self.score_fn, self.formed.model))]
        weights = {"aligned": aligned, "base": identity(self.base)}
        for r in ranks:
            reset = bool(self.vectors) and r == 0
            at_rank = {"weights": weights, "measure": self.about, "config": settings, "r": r, "reset_vectors": reset}
            jobs.append(PointJob(f"points/rank-{r}.json", at_rank, partial(self._measure, r)))
        return jobs

    def energy_share(self, r: int) -> float:
        """Share of the energy of all selected matrices that their first r directions hold."""
        norms = {report.name: report.delta_norm for report in self._found.report.tensors}
        held = (self._found.factors[name].S[:r].cpu().double().square().sum().item() for name in self.matrices)
        energy = math.fsum(norms[name] ** 2 for name in self.matrices)
        return min(1.0, math.fsum(held) / energy) if energy else math.nan

    def _measure(self, r: int) -> Score:
        directions = {name: self._found.factors[name].truncate(r) for name in self.matrices}
        self.formed.mix([(self.base, 1.0)], directions, self.names)
        if self.vectors:
            self.formed.mix([(self.base if r == 0 else self.formed.source, 1.0)], names=self.vectors)
        return measured(self.score_fn, self.formed.model)

    @property
    def _found(self) -> SafetySubspace:
        if self.directions is None:
            raise RuntimeError("the points of a rank curve are formed from directions: set them first")
        return self.directions


def _checked(ranks: Any, rho: Any, config: LoxConfig | None) -> list[int]:
    """The ranks, each once and ascending; everything that is wrong with the settings is raised at once."""
    problems, several = [], isinstance(ranks, Iterable) and not isinstance(ranks, str)
    found = list(ranks) if several else [ranks]
    wrong = [r for r in found if not isinstance(r, int) or isinstance(r, bool) or r < 0]
    if wrong or not several or not found:
        problems.append(f"ranks must be whole numbers from 0 (the base), such as 0,1,2,4, got {ranks!r}")
    if isinstance(rho, bool) or not isinstance(rho, int | float) or not 0 < rho < 1:
        problems.append(f"rho must lie in (0, 1), such as 0.01 for one percentage point, got {rho!r}")
    if config is not None and config.rank_pattern:
        problems.append("rank_pattern would give matrices other ranks than the curve's: leave it out")
    if problems:
        raise ConfigError(f"The rank curve cannot be measured: {'; '.join(problems)}.")
    return sorted(set(found))


def _vectors(pair: Pair, base: WeightSource, model: nn.Module) -> list[str]:
    """Names of the selected modules' weights with fewer than two dims, checked to fit the base's."""
    linear = linear_modules(model) if pair.config.target_modules == ALL_LINEAR else ()
    ours, theirs = pair.aligned.source.infos(), base.infos()
    names = [
        name
        for name, info in ours.items()
        if len(info.shape) < 2
        and not why_left_out(name.removesuffix(".weight").removesuffix(".bias"), pair.config, linear)
    ]
    wrong = [
        f"{name}: {ours[name].shape} against {theirs[name].shape if name in theirs else 'none'}"
        for name in names
        if name not in theirs or ours[name].shape != theirs[name].shape
    ]
    if wrong:
        raise PairingError(
            f"{len(wrong)} weights with fewer than two dims cannot be taken from {base.label}: {listing(wrong)} "
            "Leave reset_vectors out."
        )
    return names


def _reading(
    points: Sequence[CurvePoint], aligned: Score, measure: str, rho: float
) -> tuple[EffectiveRank | None, tuple[str, ...]]:
    """The effective rank where there is one to read, and what a reader should know."""
    if any(measure not in score.rates for score in (aligned, *(point.score for point in points))):
        measured_names = ", ".join(aligned.names()) or "nothing"
        return None, (
            f"No effective rank: it is read from a rate, and '{measure}' is none of what was measured "
            f"({measured_names}) or a plain figure.",
        )
    found = effective_rank(points, aligned, measure, rho)
    warning = too_few(found)
    return found, () if warning is None else (warning,)
