"""What the figures of a stress test do not show, in sentences."""

from itertools import pairwise

from lox_hf.records import StressReport
from lox_hf.robustness.findings.learning_rates import ALIGNED
from lox_hf.robustness.findings.wording import number, percent

ALWAYS = (
    "These attacks are fixed recipes: an attacker who knows of the hardening and adapts to it was not tried, and no "
    "such attacker is known to be stopped by it.",
    "Attack success is what the judge says. A judge of refusals counts every readable answer that does not refuse, "
    "whether it is harmful, harmless or beside the point.",
    "What holds for these two models need not hold for larger ones, other families or another alignment.",
    "The base model and the model before hardening stay unprotected: whoever has one of them needs no attack on this.",
)


def limits(report: StressReport) -> tuple[str, ...]:
    """Say what a report's figures do not show.

    Args:
        report: The report; its own limits are not read.

    Returns:
        The sentences: those that hold for every stress test, and those that this one's figures call for.
    """
    return (
        *ALWAYS,
        *_learning_rates(report),
        *_one_pair(report),
        _tests(report),
        *_unmeasured(report),
        *_bounds(report),
    )


def _learning_rates(report: StressReport) -> list[str]:
    rates = sorted({float(rate) for outcome in report.outcomes for rate in outcome.scanned})
    lines = [f"Learning rates other than {', '.join(map(str, rates))}, longer attacks and other data may do worse."]
    scanned = [outcome for outcome in report.outcomes if len(outcome.scanned) > 1]
    if scanned:
        told = min(len(half.values) for outcome in scanned for half in outcome.scanned.values())
        lines.append(f"Which learning rate is worst for a model was told from {number(told, 'seed')}.")
    highest = sum(outcome.learning_rate == max(map(float, outcome.scanned)) for outcome in scanned)
    if highest:
        lines.append(
            f"In {highest} of {number(len(scanned), 'pair')} of a model and an attack the highest learning rate was "
            "the worst one: a higher one may be worse still."
        )
    return lines


def _one_pair(report: StressReport) -> list[str]:
    if len(report.seeds) < 2 or not report.settings.get("one_pair"):
        return []
    return [
        "All seeds attack one pair of models: they vary only the order of rows and random edits, so how much another "
        "pair of the same kind would differ is not in any spread."
    ]


def _tests(report: StressReport) -> str:
    seeds = len(report.seeds)
    compared = sum(outcome.model != ALIGNED for outcome in report.outcomes)
    return (
        f"{number(seeds, 'seed')}: no test over them can give a p-value below {2 / 2**seeds:.2g}. The test over "
        "the prompts of one seed says nothing of other seeds. No p-value is corrected for "
        f"{number(compared, 'comparison')} of a model with the aligned one."
    )


def _unmeasured(report: StressReport) -> list[str]:
    lines = []
    if without := {outcome.model: None for outcome in report.outcomes if not outcome.utility_kept.n}:
        lines.append(
            f"Utility after an attack was not measured, or the aligned model has none, for {', '.join(without)}: "
            "there no guard tells a model that holds out from one that no longer answers."
        )
    if not any(before.over_refusal.n for before in report.before):
        lines.append("No harmless prompt was scored: a gain that is only extra refusal does not show as such.")
    aligned = [outcome for outcome in report.outcomes if outcome.model == ALIGNED]
    if low := [outcome.attack for outcome in aligned if not outcome.matched_asr.n]:
        lines.append(
            f"The aligned model never reached an attack success of {percent(report.settings['matched_level'])} under "
            f"{', '.join(low)}, so there is no matched budget."
        )
    return lines


def _bounds(report: StressReport) -> list[str]:
    gaps = [b.step - a.step for cell in report.cells for a, b in pairwise(cell.readings)]
    apart = str(min(gaps, default=0)) if len(set(gaps)) < 2 else f"{min(gaps)} to {max(gaps)}"
    lines = [f"Half-lives are interpolated between readings {apart} steps apart."] if gaps else []
    bounds = sum(outcome.half_life.bounded for outcome in report.outcomes)
    if bounds:
        lines.append(
            f"In {number(bounds, 'run')} half the refusals were not lost within the attack; they entered with its "
            "last step, as a lower bound. A difference is a bound where one of its runs is, unknown where both are."
        )
    return lines
