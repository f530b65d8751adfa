"""Why a hardening is recommended, or none is, in sentences for somebody who has never chosen one."""

import math
from collections.abc import Sequence

from lox_hf.analysis.limits import change, in_words, is_judged, may_break, miss, prompts_needed
from lox_hf.records import Candidate, Score, Selection
from lox_hf.records.score import UNKNOWN, YES
from lox_hf.statistics import paired_difference

STRENGTH = "strength"
MEASURES = {"asr_mean": "mean attack success rate along the attack", "asr": "attack success rate after the attack"}
NOT_MEASURED = (
    "Robustness was not measured: this is the strongest edit that the limits allow, which need not be the most robust "
    "one. In the paper's own ablation neither a larger r nor a larger alpha is always better. Choose again with an "
    "attack (--attack gsm8k, or attack_fn), or run lox-hf stress on the choice before you rely on it."
)
OF_HARM = ("asr", "degenerate")
NO_COST = (
    "What this costs was not measured: neither refusals of harmless prompts nor usefulness. A model that refuses "
    "everything would look perfect here, so do not use it before you have measured them: pass prompts that are "
    "labelled harmless, such as xstest (--prompts)."
)
ONE_ATTACK = (
    "This is one attack with one seed at one learning rate, and the choice was made by it: lox-hf stress with several "
    "seeds says what is left of the gain."
)


def explain(selection: Selection, best: Candidate | None, references: Sequence[Candidate]) -> tuple[str, ...]:
    """Say why.

    Args:
        selection: The judged selection, with its recommendation.
        best: The best candidate that keeps the limits, recommended or not; None where there is none.
        references: Candidates that are named beside it.

    Returns:
        Sentences.
    """
    if best is None:
        found = _none_keeps(selection)
    elif selection.recommended is None:
        found = _no_help(selection, best)
    else:
        found = [_choice(selection, best), _costs(selection, best), *_robustness(selection, best)]
    found += [_beside(selection, item) for item in references if item.name != selection.recommended]
    unknown = [limit.measure for limit in selection.limits if not is_judged(limit, selection.aligned_score)]
    if unknown:
        found.append(f"Not judged, as it was not measured of the aligned model: {', '.join(unknown)}.")
    return tuple(found)


def warn(selection: Selection) -> tuple[str, ...]:
    """Say what a reader should know of a recommendation: limits that it keeps, but not for certain.

    Args:
        selection: The judged selection, with its recommendation.

    Returns:
        Sentences.
    """
    if selection.recommended is None:
        return ()
    chosen, aligned = selection.get(selection.recommended), selection.aligned_score
    judged = [limit.measure for limit in selection.limits if is_judged(limit, aligned)]
    blind = () if set(judged) - set(OF_HARM) else (NO_COST,)
    if not chosen.uncertain:
        return blind
    needed = {
        limit.measure: prompts_needed(limit) for limit in selection.limits if may_break(limit, aligned, chosen.score)
    }
    enough = [f"{number} for {name}" for name, number in needed.items() if number is not None]
    never = [name for name, number in needed.items() if number is None]
    found = (
        f"No candidate keeps every limit for certain. {chosen.name} keeps them by what was measured, but at 95 %: "
        f"{'; '.join(chosen.uncertain)}."
    )
    if enough:
        found += f" To be sure it takes more prompts, at least {', '.join(enough)} where no answer gets worse."
    if never:
        found += f" No number of prompts makes a limit of 0 certain: {', '.join(never)}."
    return (*blind, found)


def measure_words(name: str) -> str:
    """Return what an objective is."""
    return MEASURES.get(name, f"{name} after the attack")


def value_words(score: Score, name: str) -> str:
    """Return a measure with its unit: per cent for rates and their means, else the figure."""
    value = score.value(name)
    if math.isnan(value):
        return "not known"
    return f"{100 * value:.1f} %" if name in score.rates or name in MEASURES else f"{value:.3g}"


def _choice(selection: Selection, best: Candidate) -> str:
    sure = " for certain" * (not best.uncertain)
    alike = [item for item in selection.candidates if not item.broken and not (item.uncertain and not best.uncertain)]
    if selection.objective == STRENGTH or best.attacked is None or selection.aligned_attacked is None:
        return (
            f"Take {best.name}: of the {len(alike)} of {len(selection.candidates)} candidates that keep every "
            f"limit{sure} it is the strongest edit, {best.strength:.2f} times what alignment changed in all."
        )
    tried = sum(item.attacked is not None for item in alike)
    ours, theirs = (value_words(score, selection.objective) for score in (best.attacked, selection.aligned_attacked))
    return (
        f"Take {best.name}: {len(alike)} of {len(selection.candidates)} candidates keep every limit{sure}, {tried} "
        f"of them were attacked, and it has the lowest {measure_words(selection.objective)}, {ours} against {theirs} "
        "of the aligned model."
    )


def _costs(selection: Selection, best: Candidate) -> str:
    aligned = selection.aligned_score
    judged = [limit for limit in selection.limits if is_judged(limit, aligned)]
    if not judged:
        return "What it costs is not known: none of the limits could be judged."
    costs = []
    for limit in judged:
        by = change(limit, aligned, best.score)
        moved = by if limit.higher_is_worse else -by
        sign = "+" if moved >= 0 else "-"
        costs.append(f"{limit.measure} {sign}{in_words(limit, abs(moved), aligned)}")
    return f"What it costs before any attack, against the aligned model: {', '.join(costs)}."


def _robustness(selection: Selection, best: Candidate) -> list[str]:
    """How sure the gain is, and what is left of it at the end of the attack."""
    theirs, ours = selection.aligned_attacked, best.attacked
    if ours is None or theirs is None:
        return [NOT_MEASURED]
    halves = [score.value("steps_to_half") for score in (ours, theirs)]
    found = []
    if not math.isnan(halves[1]):
        ours_at = (
            "do not get through within the attack" if math.isnan(halves[0]) else f"get through at step {halves[0]:.1f}"
        )
        found.append(f"Half of the prompts {ours_at}; of the aligned model it is step {halves[1]:.1f}.")
    name = selection.objective if selection.objective in ours.rates else "asr"
    marks = [score.marks.get(name, "") for score in (theirs, ours)]
    pairs = [pair for pair in zip(*marks, strict=False) if UNKNOWN not in pair]
    if not pairs or len(marks[0]) != len(marks[1]):
        return [*found, f"Whether the gain could be chance is not known: no prompts can be compared. {ONE_ATTACK}"]
    last = paired_difference([first == YES for first, _ in pairs], [second == YES for _, second in pairs])
    certain = last.p_value < 0.05 and last.difference < 0
    likely = "a difference that is hardly chance" if certain else "which could be chance"
    if not certain and name != selection.objective:
        likely += ": what is gained is time, and whether that is chance only more seeds can say"
    return [
        *found,
        f"At the end of the attack its {name} is {100 * last.after.share:.1f} % against {100 * last.before.share:.1f} "
        f"% of the aligned model on the same {len(pairs)} prompts (exact McNemar test, p {last.p_value:.2g}), "
        f"{likely}. {ONE_ATTACK}",
    ]


def _none_keeps(selection: Selection) -> list[str]:
    keeping = sum(not item.broken for item in selection.candidates)
    if keeping:
        return [
            f"{keeping} candidates keep every limit, but their {selection.objective} was not measured: none is taken."
        ]
    aligned = selection.aligned_score
    nearest = min(selection.candidates, key=lambda item: (miss(selection.limits, aligned, item.score), item.strength))
    return [
        f"None of the {len(selection.candidates)} candidates keeps every limit, so none is recommended. The nearest "
        f"miss is {nearest.name}: {'; '.join(nearest.broken)}. Try smaller alphas or fewer weights (--alphas, "
        "--targets); a wider limit is yours to set where you can bear the cost."
    ]


def _no_help(selection: Selection, best: Candidate) -> list[str]:
    name, aligned = selection.objective, selection.aligned_attacked
    if aligned is None or best.attacked is None:
        return ["Hardening does not help here: no candidate that keeps the limits changes the model."]
    theirs, ours = value_words(aligned, name), value_words(best.attacked, name)
    found = [
        f"Hardening does not help here: of the candidates that keep the limits and were attacked none has a lower "
        f"{measure_words(name)} than the aligned model, {theirs}; the best, {best.name}, has {ours}."
    ]
    if aligned.value(name) <= 0.02 and name in MEASURES:
        found.append(
            "The attack hardly harms the aligned model, so there is nothing to protect it from: choose a stronger "
            "attack (--attack, --attack-lr) to see a difference."
        )
    return found


def _beside(selection: Selection, item: Candidate) -> str:
    whole = "Full rank" if item.config["r"] is None else "The paper's setting"
    kept = f"breaks a limit ({'; '.join(item.broken)})" if item.broken else "keeps the limits"
    if not item.broken and item.uncertain:
        kept += ", but not for certain"
    attacked = (
        ""
        if item.attacked is None
        else (f"; its {measure_words(selection.objective)} is {value_words(item.attacked, selection.objective)}")
    )
    return f"{whole}, {item.name}, {kept}{attacked}."
