"""The models of a selection: how each is formed in the loaded one and measured, and what its result depends on."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from lox_hf.analysis.candidates import Targets, Trial, delta_norms, make_trials, strength
from lox_hf.analysis.directions import base_of, check_same_models, find_directions
from lox_hf.analysis.formed import FormedModel
from lox_hf.analysis.points import PointJob, ScoreFn, identity, measured, with_dtype
from lox_hf.edit.tensor import Directions, matrix_names
from lox_hf.errors import UnsupportedModelError
from lox_hf.inputs import Pair
from lox_hf.records import Candidate, Score
from lox_hf.run_folder import RunFolder
from lox_hf.subspace import SafetySubspace
from lox_hf.weights.live import live_tensors


class Grid:
    """The models of a grid: how each is formed and measured, and what its result depends on.

    Args:
        formed: The place where they are formed.
        pair: The two models, and every matrix.
        about: Settings of the measure.
        rs: Ranks.
        alphas: Strengths.
        targets: Which weights.
    """

    def __init__(
        self,
        formed: FormedModel,
        pair: Pair,
        about: dict[str, Any],
        rs: Sequence[int | float | None],
        alphas: Sequence[float],
        targets: Sequence[Targets],
    ) -> None:
        self.formed, self.pair = formed, pair
        infos = pair.aligned.source.infos()
        live = {plan.name: infos[plan.name] for plan in pair.plans}
        self.trials = make_trials(formed.model, live, rs, alphas, targets, pair.config)
        self.aligned, self.base = identity(pair.aligned.source), identity(base_of(pair))
        self.about = with_dtype(about, formed.model)
        self.norms = delta_norms(pair)
        self.directions: dict[type, SafetySubspace] = {}

    def check(self, subspace: SafetySubspace) -> None:
        """Check that saved directions are of these models and deep enough for every candidate."""
        source, factors = self.pair.aligned.source, subspace.factor_source()
        for trial in self.trials:
            if trial.config.r is not None:
                factors.check(source, list(trial.plans), trial.config)
        held = [
            plan
            for plan in self.pair.plans
            if plan.edit and all(name in subspace.factors for name in matrix_names(plan.name, plan.shape))
        ]
        check_same_models(subspace, replace(self.pair, plans=held))

    def find_directions(self, given: SafetySubspace | None, folder: RunFolder, progressbar: bool | None) -> None:
        """Have the directions of all ranks at hand: one set for numbers of directions, one for shares of energy."""
        for kind, name in ((int, "subspace"), (float, "subspace-shares")):
            rs = [trial.config.r for trial in self.trials if isinstance(trial.config.r, kind)]
            if rs and given is not None:
                self.directions[kind] = given
            elif rs:
                r = max(rs, key=float)
                plans = [replace(plan, r=r) for plan in self.pair.plans]
                deepest = replace(self.pair, config=replace(self.pair.config, r=r), plans=plans)
                self.directions[kind] = find_directions(deepest, folder, progressbar, name)

    def candidate(self, trial: Trial, score: Score) -> Candidate:
        """Put together what is known of one hardening before any attack."""
        size = strength(trial.plans, self.directions.get(type(trial.config.r)), self.norms)
        return Candidate(trial.name, trial.config.to_dict(), trial.targets, size, score)

    def jobs(
        self, kind: str, about: dict[str, Any], score_fn: ScoreFn, chosen: Sequence[Candidate] | None = None
    ) -> list[PointJob]:
        """The aligned model first, then the candidates; None takes all."""
        names = None if chosen is None else {candidate.name for candidate in chosen}
        shared = {"measure": self.about, **about}
        own = {"weights": {"aligned": self.aligned}, **shared}
        weights = {"aligned": self.aligned, "base": self.base}
        aligned = PointJob(f"{kind}/aligned.json", own, partial(self._measure, None, score_fn))
        return [
            aligned,
            *(
                PointJob(
                    f"{kind}/{trial.file_name}",
                    {"weights": weights, **shared, "config": trial.about()},
                    partial(self._measure, trial, score_fn),
                )
                for trial in self.trials
                if names is None or trial.name in names
            ),
        ]

    def in_place(self, attack_fn: ScoreFn) -> ScoreFn:
        """Refuse an attack that puts other tensors in the place of the model's: they could not be put back."""

        def attack(model: nn.Module) -> Any:
            before = _places(model)
            found = attack_fn(model)
            if _places(model) != before:
                raise UnsupportedModelError(
                    "attack_fn has put other tensors in the place of the model's weights, so its own cannot be put "
                    "back: it must train the loaded model where it is, without model.to(...) or a wrapper that stays."
                )
            return found

        return attack

    def _measure(self, trial: Trial | None, score_fn: ScoreFn) -> Score:
        if trial is None:
            self.formed.restore()
        else:
            self.formed.harden(trial.plans, self._factors(trial))
        return measured(score_fn, self.formed.model)

    def _factors(self, trial: Trial) -> Directions:
        r = trial.config.r
        return self.pair.factors if r is None else self.directions[type(r)].factor_source()


def _places(model: nn.Module) -> dict[str, int]:
    return {name: tensor.data_ptr() for name, tensor in live_tensors(model).items()}
