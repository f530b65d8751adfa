"""What a stress test's report is made of: tables with every seed, lists, and how to read them. No markup here."""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import compress
from typing import Any, NamedTuple

from lox_hf.records import AttackOutcome, SeedDifference, Spread, StressReport
from lox_hf.robustness.findings.wording import later, lower, p_value, percent, role, seed_names
from lox_hf.robustness.plots import models_of, outcomes_by_attack
from lox_hf.robustness.report.glossary import DRIFT, UNKNOWN, control, reading

SHORT = ("model", "rate", "steps to 50 %", "mean", "matched", "equal refusal", "end")  # where there is no room


class Cell(NamedTuple):
    """One cell of a table.

    Attributes:
        text: What it says.
        seeds: The figure of every seed, in the order of the seeds; empty where there is one only.
        detail: What has to be said beside it.
    """

    text: str
    seeds: tuple[str, ...] = ()
    detail: str = ""


@dataclass(frozen=True)
class Table:
    """One table.

    Attributes:
        title: What it is about.
        header: The first is the column of names.
        rows: Name first.
        note: How to read it.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""


@dataclass(frozen=True)
class Section:
    """One part of a report.

    Attributes:
        title: Its heading.
        tables: Its tables.
        lines: Its sentences, before the tables.
    """

    title: str
    tables: tuple[Table, ...] = ()
    lines: tuple[str, ...] = ()


def sections(report: StressReport) -> list[Section]:
    """Lay out a report behind its headline and its figures.

    Args:
        report: The report.

    Returns:
        The sections in their order; those that have nothing to say are left out.
    """
    attacks = outcomes_by_attack(report)
    found = [
        Section("How to read the tables", lines=reading(report)),
        *(Section(f"Attack: {name}", (safety_table(report, name), _gains(report, name))) for name in attacks),
        Section("Models before any attack", (before_table(report),)),
        Section("Controls", tuple(_controls(report)), report.notes),
        Section("Learning rates scanned", tuple(_scans(name, own) for name, own in attacks.items())),
        Section("Worst case over the attacks", tuple(worst_tables(report))),
        Section("What the attack taught, and what is left of the model", tuple(_by_attack(attacks, _USES))),
        Section("Drift", tuple(_by_attack(attacks, _DRIFT, DRIFT))),
        Section("Not run", lines=report.not_run),
        Section("What the figures do not show", lines=report.limits),
        Section("Settings and versions", (_settings(report),)),
    ]
    return [section for section in found if section.lines or any(table.rows for table in section.tables)]


def safety_table(report: StressReport, attack: str) -> Table:
    """Tabulate what an attack did to the safety of every model.

    Args:
        report: The report.
        attack: Name of the attack.

    Returns:
        A row per model: its worst learning rate, and five figures, those of `SHORT`; behind them the forbidden content
        where known answers tell, and what is degenerate where anything is.
    """
    matched, level = percent(report.settings["matched_level"]), percent(report.settings["refusal_level"])
    header = (
        *("model", "learning rate", "steps to ASR 50 %", "mean ASR (%)", f"ASR (%) when aligned has {matched}"),
        *(f"ASR (%) at {level} benign refusal", "ASR at the end (%)"),
        *("strict ASR at the end (%)", "degenerate at the end (%)"),
    )
    outcomes = outcomes_by_attack(report)[attack]
    kept = [True] * len(SHORT)
    kept += [any(own.final_strict_asr.n for own in outcomes), any(own.final_degenerate.mean > 0 for own in outcomes)]
    rows = [
        (
            Cell(outcome.model, detail=_collapsed(outcome)),
            Cell(f"{outcome.learning_rate:g}"),
            figure(outcome.half_life, digits=1),
            share(outcome.mean_asr),
            _matched(outcome),
            *map(share, (outcome.equal_refusal_asr, outcome.final_asr)),
            *map(share, (outcome.final_strict_asr, outcome.final_degenerate)),
        )
        for outcome in outcomes
    ]
    table = Table("Safety along the attack, each model at its worst learning rate", header, tuple(rows))
    return _columns(table, kept)


def _matched(outcome: AttackOutcome) -> Cell:
    """The aligned model's own rate there is the matched level by definition: its budget says more."""
    if role(outcome.model) != "aligned" or not outcome.matched_steps.n:
        return share(outcome.matched_asr)
    return figure(outcome.matched_steps, digits=1)._replace(text=f"step {outcome.matched_steps.mean:.1f}")


def before_table(report: StressReport) -> Table:
    """Tabulate every model before any attack."""
    found = {before.model: before for before in report.before}
    perplexity = report.settings.get("utility") == "perplexity"
    rows = []
    for before in (found[model] for model in models_of(report) if model in found):
        broken = f"broken on {seed_names(before.broken)}" if before.broken else ""
        utility = figure(before.utility, digits=1) if perplexity else share(before.utility)
        figures = (share(before.asr), share(before.over_refusal), share(before.accuracy), utility)
        rows.append((Cell(before.model, detail=broken), *figures))
    utility = "perplexity" if perplexity else "utility (%)"
    header = ("model", "ASR (%)", "benign refusal (%)", "benign answered right (%)", utility)
    return _known(Table("", header, tuple(rows)))


def worst_tables(report: StressReport) -> list[Table]:
    """Tabulate every model over all attacks; no table for one attack."""
    found = {worst.model: worst for worst in report.worst}
    rows = tuple(
        (Cell(worst.model), Cell(worst.attack), share(worst.mean_asr), figure(worst.half_life, digits=1))
        for worst in (found[model] for model in models_of(report) if model in found)
    )
    header = ("model", "worst attack", "mean ASR under it (%)", "shortest: steps to ASR 50 %")
    return [Table("", header, rows)] if rows else []


def figure(spread: Spread, *, digits: int = 0, factor: float = 1.0, sign: str = "") -> Cell:
    """Put a figure over seeds into a cell.

    Args:
        spread: The figure.
        digits: Decimals.
        factor: What it is multiplied by: 100 for per cent.
        sign: "+" for differences.

    Returns:
        Mean and standard deviation, and every seed; ">=" and "<=" mark bounds.

    Example:
        >>> figure(Spread((8.0, 20.0), 14.0, 8.5, 2, ("", ">=")))
        Cell(text='>= 14 +- 8', seeds=('8', '>= 20'), detail='')
    """

    def shown(value: float, sign: str = sign, bound: str = "") -> str:
        # Adding 0 takes the sign off what rounds to it.
        text = UNKNOWN if math.isnan(value) else f"{round(factor * value, digits) + 0.0:{sign}.{digits}f}"
        return f"{bound} {text}".strip()

    bounds = spread.bounds or ("",) * len(spread.values)
    seeds = tuple(shown(value, bound=bound) for value, bound in zip(spread.values, bounds, strict=True))
    deviation = "" if math.isnan(spread.sd) else f" +- {shown(spread.sd, '')}"
    return Cell(shown(spread.mean, bound=spread.bound) + deviation, seeds if spread.n and len(seeds) > 1 else ())


def share(spread: Spread) -> Cell:
    """Put a share over seeds into a cell, in per cent."""
    return figure(spread, factor=100)


def _gains(report: StressReport, attack: str) -> Table:
    level = percent(report.settings["refusal_level"])
    header = (
        *("model", "steps to ASR 50 %", "mean ASR (points)", "ASR at the matched budget (points)"),
        *(f"ASR at {level} benign refusal (points)", "p over each seed's prompts at the matched budget (McNemar)"),
    )
    rows = [
        (
            Cell(outcome.model, detail=_collapsed(outcome)),
            _gain(outcome.half_life_gain, later, digits=1),
            *(
                _gain(found, lower, factor=100)
                for found in (outcome.mean_asr_gain, outcome.matched_gain, outcome.equal_refusal_gain)
            ),
            _p_values(outcome.matched_mcnemar),
        )
        for outcome in outcomes_by_attack(report)[attack]
        if role(outcome.model) != "aligned"
    ]
    return Table("Against the aligned model, seed by seed", header, tuple(rows))


def _gain(found: SeedDifference, count: Callable[[SeedDifference], str], **form: Any) -> Cell:
    cell = figure(found.difference, sign="+", **form)
    return cell._replace(detail=count(found) + p_value(found)) if found.difference.n else cell


def _p_values(found: Spread) -> Cell:
    """Every seed's own; a mean of them, or one of all prompts at once, would mean nothing."""
    return Cell(", ".join(UNKNOWN if math.isnan(p) else f"{p:.2g}" for p in found.values) if found.n else UNKNOWN)


def _collapsed(outcome: AttackOutcome) -> str:
    lost = outcome.collapsed
    return f"utility collapsed on {seed_names(lost)}: no defence, not counted" if lost else ""


def _controls(report: StressReport) -> Iterable[Table]:
    controls = [model for model in models_of(report) if role(model) == "control"]
    rows = tuple((Cell(model), Cell(control(model))) for model in controls)
    return [Table("", ("control", "what it is, and what it would mean"), rows)] if rows else []


def _scans(attack: str, outcomes: Sequence[AttackOutcome]) -> Table:
    rates = sorted({rate for outcome in outcomes for rate in outcome.scanned}, key=float)
    rows = []
    for outcome in outcomes:
        cells = [
            figure(outcome.scanned[rate], digits=1) if rate in outcome.scanned else Cell(UNKNOWN) for rate in rates
        ]
        is_worst = [float(rate) == outcome.learning_rate for rate in rates]
        told = [cell._replace(detail="worst" * worst) for cell, worst in zip(cells, is_worst, strict=True)]
        rows.append((Cell(outcome.model), *told))
    note = "Steps to ASR 50 % at each learning rate, on the seeds that met all of them."
    return Table(attack, ("model", *(f"{float(rate):g}" for rate in rates)), tuple(rows), note)


_USES: dict[str, Callable[[AttackOutcome], Cell]] = {
    "attack's own task right (%)": lambda outcome: share(outcome.task_accuracy),
    "loss on it (nats per token)": lambda outcome: figure(outcome.task_loss, digits=2),
    "utility kept (% of the aligned model's)": lambda outcome: share(outcome.utility_kept),
    "benign refusal before (%)": lambda outcome: share(outcome.over_refusal_before),
}
_DRIFT: dict[str, Callable[[AttackOutcome], Cell]] = {
    "retention afterwards": lambda outcome: figure(outcome.retention, digits=2),
    "R_ft / R_align afterwards": lambda outcome: figure(outcome.r_ratio, digits=2),
}


def _by_attack(
    attacks: dict[str, list[AttackOutcome]], columns: dict[str, Callable[[AttackOutcome], Cell]], note: str = ""
) -> list[Table]:
    """A table per attack."""
    tables = []
    for attack, outcomes in attacks.items():
        rows = [(Cell(outcome.model), *(column(outcome) for column in columns.values())) for outcome in outcomes]
        tables.append(_known(Table(attack, ("model", *columns), tuple(rows), note)))
    return [table for table in tables if len(table.header) > 1]


def _known(table: Table) -> Table:
    """A table without the columns of which nothing is known."""
    return _columns(table, [any(row[at].text != UNKNOWN for row in table.rows) for at in range(len(table.header))])


def _columns(table: Table, kept: Sequence[bool]) -> Table:
    """Some columns of a table."""
    rows = tuple(tuple(compress(row, kept)) for row in table.rows)
    return replace(table, header=tuple(compress(table.header, kept)), rows=rows)


def _settings(report: StressReport) -> Table:
    models = {
        name: model.name_or_path + (f" at {model.revision}" if model.revision else "")
        for name, model in (("aligned model", report.aligned), ("base model", report.base))
    }
    told = {**models, **_flat(report.settings), **report.versions}
    return Table("", ("setting", "value"), tuple((Cell(name), Cell(str(value))) for name, value in told.items()))


def _flat(settings: dict[str, Any], above: str = "") -> dict[str, str]:
    """Settings with their path as the name."""
    flat = {}
    for name, value in settings.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{above}{name}.")
        else:
            flat[f"{above}{name}"] = value if isinstance(value, str) else json.dumps(value)
    return flat
