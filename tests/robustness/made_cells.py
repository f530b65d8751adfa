"""Runs of a stress test made by hand: straight lines whose half-lives, means and crossings are known."""

import math
from collections.abc import Mapping, Sequence

from lox_hf.records import (
    CellResult,
    DriftReading,
    ModelReference,
    Rate,
    StepReading,
    StressReport,
    TaskScore,
    UtilityScore,
)
from lox_hf.robustness.findings.summary import summarise
from lox_hf.statistics import rate

N = 1000
NOTHING = rate(0, 0)


def reading(step: int, asr: float, over_refusal: float | None = None) -> StepReading:
    """A reading of 1,000 prompts of each kind; NaN is nothing scored, None no harmless prompts."""
    scored = rate(0, 0, unscored=N) if math.isnan(asr) else _rate(asr)
    return StepReading(step, scored, NOTHING, NOTHING, NOTHING, _rate(over_refusal), NOTHING)


def lettered(step: int, labels: str) -> StepReading:
    """A reading whose prompts are known one by one."""
    unscored = labels.count("u")
    asr = rate(labels.count("c"), len(labels) - unscored, unscored)
    return StepReading(step, asr, NOTHING, NOTHING, NOTHING, NOTHING, NOTHING, labels)


def line(half: float, steps: int = 20, end: float | None = None) -> list[StepReading]:
    """ASR grows evenly and is 50 % after `half` steps; it stays at 100 % or, where one is given, at `end`."""
    top = 1.0 if end is None else end
    corner = 2 * half * top
    assert corner == int(corner), "the corner must be a step"
    known = {0: 0.0, int(corner): top} | ({steps: top} if corner < steps else {steps: steps / (2 * half)})
    return [reading(step, asr) for step, asr in sorted(known.items()) if step <= steps]


def cell(
    model: str,
    seed: int = 0,
    readings: Sequence[StepReading] | float = 5.0,
    *,
    attack: str = "pairs",
    lr: float = 1e-4,
    kept: float | None = 1.0,
    before: float = 1.0,
    task: tuple[float | None, float] = (None, math.nan),
) -> CellResult:
    """A run; a number instead of readings is the half-life of a straight line. `kept` and `before` are accuracies."""
    accuracy, loss = task
    return CellResult(
        model=model,
        attack=attack,
        learning_rate=lr,
        seed=seed,
        readings=tuple(line(readings) if isinstance(readings, float) else readings),
        task_before=TaskScore(NOTHING),
        task_after=TaskScore(_rate(accuracy), loss),
        utility_before=utility(None if kept is None else before),
        utility_after=utility(kept),
        drift_before=DriftReading(1.0, 0.3, 0.3, 1.0),
        drift_after=DriftReading(0.7, 0.2, 0.3, 0.66),
    )


def utility(accuracy: float | None) -> UtilityScore:
    return UtilityScore("not measured" if accuracy is None else "known answers", _rate(accuracy))


def cells_of(halves: Mapping[str, Sequence[float]], **changes: object) -> list[CellResult]:
    """Runs of several models at one learning rate: half-lives by seed, from seed 0 on."""
    found = []
    for model, own in halves.items():
        found += [cell(model, seed, half, **changes) for seed, half in enumerate(own)]  # type: ignore[arg-type]
    return found


def report_of(cells: Sequence[CellResult], **changes: object) -> StressReport:
    return summarise(
        cells,
        aligned=ModelReference("org/aligned"),
        base=ModelReference("org/base"),
        settings={"judge": "refusal"},
        **changes,  # type: ignore[arg-type]
    )


def _rate(share: float | None) -> Rate:
    return NOTHING if share is None or math.isnan(share) else rate(round(share * N), N)
