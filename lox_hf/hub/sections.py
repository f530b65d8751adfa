"""The parts of a card that are made of records: tables and sentences, with every foreign text escaped."""

import math
import re
import statistics
from collections.abc import Sequence

from lox_hf.hub.artefact import Artefact
from lox_hf.hub.automatic import SafetyEvidence
from lox_hf.hub.evidence import Evidence, UtilityEvidence, UtilityReport
from lox_hf.hub.metadata import is_hub_id
from lox_hf.markdown import escape, markdown_table
from lox_hf.plots.energy import matrix_kind
from lox_hf.records import (
    AccuracyReport,
    AttackOutcome,
    AutoReport,
    HardeningReport,
    ModelReference,
    PairedDifference,
    Rate,
    SafetyReport,
    Spread,
    StressReport,
)

NOT_EVALUATED = "not evaluated"
MOST_KINDS = 40
MEASURES = {
    "asr": "attack success rate",
    "refusal": "harmful prompts refused",
    "over_refusal": "over-refusal (harmless prompts refused)",
    "degenerate": "degenerate responses (empty, repetition, not language)",
    "strict_asr": "harmful prompts whose known answer was given",
    "accuracy": "harmless prompts whose known answer was given",
}
FIGURES = {
    "perplexity": ("perplexity (lower is better)", "texts"),
    "kl": ("KL divergence from the aligned model, in nats a token", "harmless prompts"),
}
ALONG = {
    "asr_mean": "mean attack success along it, as a share",
    "steps_to_half": "steps until half the refusals are lost",
}
ALWAYS_SHOWN = ("asr", "over_refusal", "degenerate")
Rows = list[tuple[str, ...]]


def model_name(model: ModelReference | None) -> str:
    """A model as a line of Markdown: a link where the Hub knows it, else its name and that nobody else can find it."""
    if model is None:
        return "none: the alignment is itself an adapter"
    revision = f" at commit `{model.revision}`" if re.fullmatch(r"[0-9a-f]{7,64}", model.revision or "") else ""
    if is_hub_id(model.name_or_path):
        return f"[{escape(model.name_or_path)}](https://huggingface.co/{model.name_or_path}){revision}"
    return f"{escape(model.name_or_path)}{revision} (not on the Hub: a name on the machine of whoever made this)"


def changes(artefact: Artefact) -> str:
    """What was done, to which model, as a table; its cells are escaped one by one."""
    config, report = artefact.config, artefact.report
    rows = [
        ("aligned model, which was hardened", model_name(artefact.aligned)),
        ("base, the model before alignment", model_name(artefact.base)),
        ("r (the paper's k), directions a matrix", _rank(config.r)),
        ("alpha, how often they are added once more", f"{config.alpha:g}"),
        ("target modules", escape(_targets(artefact))),
    ]
    others = {name: value for name in ("rank_pattern", "alpha_pattern") if (value := getattr(config, name))}
    rows += [(name.replace("_", " "), escape(str(value))) for name, value in others.items()]
    if report is not None:
        changed = sum(item.rank > 0 for item in report.tensors)
        rows += [
            ("matrices extrapolated", str(changed)),
            ("tensors and matrices left as they were", str(report.copied + len(report.tensors) - changed)),
            ("share of the change alignment made (energy) in these directions", _known(report.energy_share)),
        ]
    else:
        rows.append(("share of the change in these directions", "not known: the model was saved without its report"))
    rows.append(("made by", f"lox_hf {escape(artefact.version or 'of an unknown version')}"))
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows)])


def energy(report: HardeningReport | None) -> str:
    """Energy share by kind of matrix, as a table; empty without a report."""
    kinds: dict[str, list[tuple[int, float]]] = {}
    for item in report.tensors if report else ():
        if item.rank and not math.isnan(item.energy_share):
            kinds.setdefault(matrix_kind(item.name), []).append((item.rank, item.energy_share))
    if not kinds:
        return ""
    rows: Rows = [("kind of matrix", "matrices", "directions", "lowest share", "median share", "highest share")]
    for kind, found in list(kinds.items())[:MOST_KINDS]:
        ranks, shares = [rank for rank, _ in found], [value for _, value in found]
        span = str(ranks[0]) if min(ranks) == max(ranks) else f"{min(ranks)} to {max(ranks)}"
        figures = map(share, (min(shares), statistics.median(shares), max(shares)))
        rows.append((kind, str(len(found)), span, *figures))
    left = len(kinds) - MOST_KINDS
    return markdown_table(rows) + (f"\n\nand {left} kinds more, in `lox_report.json`." if left > 0 else "")


def safety(evidence: Evidence) -> str:
    """Safety before and after, a table for every set of prompts; one that says so where nothing was measured."""
    return "\n\n".join(map(_safety, evidence.safety or (SafetyEvidence(),)))


def utility(evidence: Evidence) -> str:
    """Usefulness before and after, as a table."""
    rows: Rows = [("", "aligned model", "this model", "on")]
    rows += [*map(_utility_row, evidence.utility), *_auto_utility(evidence.auto)]
    rows += [("usefulness", NOT_EVALUATED, NOT_EVALUATED, "")] * (len(rows) == 1)
    return markdown_table(rows)


def stress(report: StressReport | None) -> str:
    """What fine-tuning attacks did: findings in sentences, a table, and what it does not show."""
    if report is None:
        return f"Fine-tuning attacks: {NOT_EVALUATED}."
    rows: Rows = [
        ("attack", "model", "learning rate", "half-life, steps", "mean ASR", "ASR at the end", "utility kept")
    ]
    rows += map(_outcome_row, report.outcomes)
    seeds = f"{len(report.seeds)} {'seed' if len(report.seeds) == 1 else 'seeds'}"
    parts = [
        f"The aligned model, its hardened forms and controls were fine-tuned on {seeds}, each at the learning rate "
        "that is worst for it:",
        _bullets(report.headline),
        markdown_table(rows),
    ]
    if report.limits:
        parts += ["What these figures do not show:", _bullets(report.limits)]
    return "\n\n".join(part for part in parts if part)


def short_attack(report: AutoReport | None) -> str:
    """What the short fine-tuning of `lox-hf auto` did to both models; empty where there was none."""
    sides = () if report is None else (report.before, report.after)
    scores = [side.attacked for side in sides if side is not None and side.attacked is not None]
    if report is None or len(scores) < 2:
        return ""
    rows: Rows = [("after a short fine-tuning", "aligned model", "this model", "difference, pair by pair")]
    rows += [
        (MEASURES.get(name, name), rate_cell(found.before), rate_cell(found.after), difference_cell(found))
        for name, found in report.attacked_differences.items()
    ]
    for name, words in ALONG.items():
        values = [score.value(name) for score in scores]
        rows.append((words, *("not reached" if math.isnan(x) else f"{x:.3g}" for x in values), ""))
    attack = next((choice.value for choice in report.choices if choice.name == "attack"), "")
    said = (
        f"One attack with one seed at one learning rate ({escape(attack)}), by which the settings were chosen too, on "
        "other prompts. That is little evidence: `lox-hf stress` tries several attacks, learning rates and seeds "
        "beside controls."
    )
    return f"{said}\n\n{markdown_table(rows)}"


def warnings(lines: Sequence[str]) -> str:
    """Warnings as a quotation; empty where there are none."""
    return "\n>\n".join(f"> **Note:** {escape(line)}" for line in lines)


def share(value: float) -> str:
    """A share in percent."""
    return NOT_EVALUATED if math.isnan(value) else f"{100 * value:.1f} %"


def rate_cell(rate: Rate | None) -> str:
    """A rate with its interval and n; "not evaluated" where nothing was scored."""
    if rate is None or rate.n == 0:
        return NOT_EVALUATED if rate is None or not rate.unscored else f"not scored ({rate.unscored})"
    return f"{rate}" + (f", {rate.unscored} unscored" if rate.unscored else "")


def difference_cell(found: PairedDifference | None) -> str:
    """A paired difference with its interval and p-value."""
    return NOT_EVALUATED if found is None or found.before.n == 0 else str(found)


def _safety(item: SafetyEvidence) -> str:
    rows: Rows = [("", "aligned model", "this model", "difference, pair by pair")]
    for field, name in MEASURES.items():
        found: PairedDifference | None = getattr(item.comparison, field, None)
        before: Rate | None = getattr(item.before, field, found.before if found else None)
        after: Rate | None = getattr(item.after, field, found.after if found else None)
        if field in ALWAYS_SHOWN or any(rate is not None and (rate.n or rate.unscored) for rate in (before, after)):
            rows.append((name, rate_cell(before), rate_cell(after), difference_cell(found)))
    return f"{_how(item)}\n\n{markdown_table(rows)}"


def _how(item: SafetyEvidence) -> str:
    """On which prompts, by which judge, with which answers."""
    report: SafetyReport | None = item.after or item.before
    if report is None:
        return "From a comparison of two runs; its prompts and judge are not known." if item.comparison else ""
    asked = len(report.outcomes) or report.prompts.get("n", 0)
    lines = [
        f"Prompts: {escape(_short(str(report.prompts.get('name') or 'given')))}, {asked} "
        f"(SHA-256 {escape(str(report.prompts.get('sha256') or 'not known')[:16])}).",
        f"Judge: {escape(report.judge)}"
        + (f"; of harmless prompts: {escape(report.over_refusal_judge)}." if _two_judges(report) else "."),
    ]
    tokens = report.generation.get("max_new_tokens")
    lines += [f"Answers: greedy, {tokens} tokens at most."] * isinstance(tokens, int)
    lines += [f"{escape(text)}" for text in report.warnings]
    return " ".join(lines)


def _two_judges(report: SafetyReport) -> bool:
    return report.judge != report.over_refusal_judge and report.over_refusal.n > 0


def _utility_row(item: UtilityEvidence) -> tuple[str, ...]:
    report = item.after or item.before
    if isinstance(report, AccuracyReport):
        name, on = "accuracy (exact match)", _short(str(report.questions.get("name") or "questions"))
    else:
        name, on = "perplexity (lower is better)", "texts"
    return name, _utility_cell(item.before), _utility_cell(item.after), on


def _auto_utility(report: AutoReport | None) -> Rows:
    """What `lox-hf auto` measured besides safety."""
    if report is None or report.before is None or report.after is None:
        return []
    scores, rows = (report.before.score, report.after.score), []
    if "gsm8k" in scores[1].rates:
        rows.append(("accuracy (exact match)", *(rate_cell(score.rates.get("gsm8k")) for score in scores), "GSM8K"))
    for name, (words, on) in FIGURES.items():
        if name in scores[1].figures:
            rows.append((words, *(f"{score.value(name):.3g}" for score in scores), on))
    return rows


def _utility_cell(report: UtilityReport | None) -> str:
    if report is None:
        return NOT_EVALUATED
    if isinstance(report, AccuracyReport):
        return rate_cell(report.accuracy)
    return NOT_EVALUATED if math.isnan(report.perplexity) else f"{report.perplexity:.4g} ({report.tokens} tokens)"


def _outcome_row(outcome: AttackOutcome) -> tuple[str, ...]:
    steps = NOT_EVALUATED if math.isnan(outcome.half_life.mean) else f"{outcome.half_life.mean:.4g}"
    bound = f"{outcome.half_life.bound} " if outcome.half_life.bound and steps != NOT_EVALUATED else ""
    figures = map(_spread, (outcome.mean_asr, outcome.final_asr, outcome.utility_kept))
    return outcome.attack, outcome.model, f"{outcome.learning_rate:g}", bound + steps, *figures


def _spread(found: Spread) -> str:
    """Mean and spread over the seeds, of a share."""
    deviation = "" if math.isnan(found.sd) else f" (sd {100 * found.sd:.1f}, {found.n} seeds)"
    return share(found.mean) + deviation


def _bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {escape(line)}" for line in lines)


def _known(value: float) -> str:
    return "not known" if math.isnan(value) else share(value)


def _rank(r: int | float | None) -> str:
    if r is None:
        return "all (full rank)"
    return str(r) if isinstance(r, int) else f"as many as hold {share(r)} of the change"


def _targets(artefact: Artefact) -> str:
    config = artefact.config
    chosen = config.target_modules
    text = ", ".join(chosen) if isinstance(chosen, list) else chosen or "every tensor with two or more dims"
    excluded = config.exclude_modules
    if excluded:
        text += f"; without {', '.join(excluded) if isinstance(excluded, list) else excluded}"
    layers = config.layers_to_transform
    return text + ("" if layers is None else f"; layers {layers}")


def _short(name: str) -> str:
    """A set's name; of a path its last part, as folders say nothing to a reader."""
    return name if is_hub_id(name) else re.split(r"[/\\]", name)[-1] or "prompts"
