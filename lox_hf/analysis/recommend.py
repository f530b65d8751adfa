"""Which hardening to take: limits first, then robustness; never one that breaks a limit."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from lox_hf.analysis.candidates import ALL, PAPER_ALPHA, PAPER_R
from lox_hf.analysis.limits import broken_limits, change, is_judged, uncertain_limits
from lox_hf.analysis.reasons import explain, warn
from lox_hf.records import Candidate, Limit, Score, Selection

STRENGTH = "strength"
ALWAYS = (Limit("asr", 0.0), Limit("over_refusal", 0.0), Limit("degenerate", 0.0))
"""What the front compares in any case."""


def recommend(selection: Selection) -> Selection:
    """Judge the candidates of a selection by its limits, and choose.

    A candidate breaks a limit where what was measured of it has moved further than the limit from the aligned model's,
    or was not measured at all; it is uncertain where only the 95 % one-sided upper limit of the change lies beyond.
    Recommended is the best in the objective of those that keep all limits for certain, else of those that keep them by
    what was measured; at equal objective the one with lower over-refusal, then lower KL divergence, then the smaller
    edit. One that is no better than the aligned model itself after the attack is not recommended.

    Args:
        selection: What was measured, the limits and the objective; the rest is not read. Nothing is measured, so a
            selection that was saved can be judged by other limits.

    Returns:
        The selection with `broken`, `uncertain` and `on_front` of every candidate, the recommendation, reasons and
        warnings.

    Example:
        >>> selection = Selection.from_json(Path("select/selection.json").read_text())  # doctest: +SKIP
        >>> recommend(replace(selection, limits=(Limit("over_refusal", 0.01),))).recommended  # doctest: +SKIP
        'r=6 alpha=0.5 attention'
    """
    judged = judge(selection.candidates, selection.aligned_score, selection.limits)
    costs = _costs(selection.limits, selection.aligned_score)
    rows = [
        [*_amounts(costs, selection.aligned_score, item.score), loss(item, selection.objective)] for item in judged
    ]
    marked = [replace(item, on_front=on) for item, on in zip(judged, pareto(rows), strict=True)]
    found = replace(selection, candidates=tuple(marked), recommended=None)
    best = best_of(found)
    if best is not None and loss(best, found.objective) < _aligned_loss(found):
        found = replace(found, recommended=best.name)
    return replace(found, reasons=explain(found, best, references(marked)), warnings=warn(found))


def judge(candidates: Sequence[Candidate], aligned: Score, limits: Sequence[Limit]) -> list[Candidate]:
    """Return the candidates with the limits that each breaks, and those that it may break."""
    return [
        replace(
            candidate,
            broken=broken_limits(limits, aligned, candidate.score),
            uncertain=uncertain_limits(limits, aligned, candidate.score),
        )
        for candidate in candidates
    ]


def best_of(selection: Selection) -> Candidate | None:
    """Return the best candidate that may be recommended; None where none keeps the limits and is measured."""
    keeping = [
        item for item in selection.candidates if not item.broken and not math.isnan(loss(item, selection.objective))
    ]
    certain = [item for item in keeping if not item.uncertain]

    def order(item: Candidate) -> tuple[float, ...]:
        known = [item.score.value(name) for name in ("over_refusal", "kl")]
        return (loss(item, selection.objective), *(0.0 if math.isnan(x) else x for x in known), item.strength)

    return min(certain or keeping, key=order, default=None)


def loss(candidate: Candidate, objective: str) -> float:
    """Return the objective so that lower is better; NaN where it was not measured."""
    if objective == STRENGTH:
        return -candidate.strength
    return math.nan if candidate.attacked is None else candidate.attacked.value(objective)


def worth_attacking(candidates: Sequence[Candidate], most: int) -> list[Candidate]:
    """Choose whom to attack, of those that keep the limits: of every kind the strongest first.

    A kind is a rank with targets. Within one, strength and costs rise together, so its strongest edit is the most that
    the limits allow; which kind is the most robust is what an attack tells. Where all kinds have had a turn the second
    strongest of each follow. Those that keep the limits for certain come first, since one of them is recommended where
    there is any. The two that everybody asks about, the paper's setting and full rank, are attacked in any case, to be
    named beside it.

    Args:
        candidates: Judged candidates.
        most: How many, besides those two.

    Returns:
        The candidates, in their order in the grid.
    """
    turns: Counter[tuple[bool, str, str]] = Counter()
    order: dict[str, tuple[bool, int]] = {}
    strongest_first = sorted((item for item in candidates if not item.broken), key=lambda item: -item.strength)
    for item in strongest_first:
        kind = bool(item.uncertain), item.targets, str(item.config["r"])
        order[item.name] = kind[0], turns[kind]
        turns[kind] += 1
    chosen = sorted(strongest_first, key=lambda item: order[item.name])[:most]
    names = {item.name for item in [*chosen, *references(candidates)]}
    return [item for item in candidates if item.name in names]


def references(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return the paper's setting and the full rank of all weights, where they are in the grid.

    Of several alphas of the full rank it is the one nearest to the paper's.
    """
    whole = [item for item in candidates if item.targets == ALL]
    paper = [item for item in whole if (item.config["r"], item.config["alpha"]) == (PAPER_R, PAPER_ALPHA)]
    full = sorted(
        (item for item in whole if item.config["r"] is None),
        key=lambda item: abs(item.config["alpha"] - PAPER_ALPHA),
    )
    return paper + full[:1]


def pareto(rows: Sequence[Sequence[float]]) -> list[bool]:
    """Tell for each row whether no other one is at least as low everywhere and lower somewhere.

    Args:
        rows: Rows of one length; NaN is as bad as infinity.

    Returns:
        A truth value for each.

    Example:
        >>> pareto([[1.0, 2.0], [2.0, 1.0], [2.0, 2.0]])
        [True, True, False]
    """
    known = [tuple(math.inf if math.isnan(value) else value for value in row) for row in rows]
    return [
        not any(
            other != row and all(theirs <= ours for theirs, ours in zip(other, row, strict=True)) for other in known
        )
        for row in known
    ]


def _costs(limits: Sequence[Limit], aligned: Score) -> list[Limit]:
    named = {limit.measure: limit for limit in (*ALWAYS, *limits)}
    return [limit for limit in named.values() if is_judged(limit, aligned)]


def _amounts(costs: Sequence[Limit], aligned: Score, score: Score) -> list[float]:
    return [change(limit, aligned, score) for limit in costs]


def _aligned_loss(selection: Selection) -> float:
    if selection.objective == STRENGTH or selection.aligned_attacked is None:
        return 0.0
    return selection.aligned_attacked.value(selection.objective)
