"""What was measured of a model: reports are read, told apart by their fields, and put side by side."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lox_hf.errors import CheckpointError, ConfigError
from lox_hf.hub.automatic import SafetyEvidence, safety_evidence
from lox_hf.records import (
    AccuracyReport,
    AutoReport,
    ModelReference,
    PerplexityReport,
    Rate,
    SafetyComparison,
    SafetyReport,
    StressReport,
)

UtilityReport = AccuracyReport | PerplexityReport
Found = SafetyReport | SafetyComparison | StressReport | AutoReport | UtilityReport
RUN_FILES = ("report.json", "comparison.json", "utility.json", "results.json")
"""What runs leave in their folders that holds numbers and no text."""


@dataclass(frozen=True)
class UtilityEvidence:
    """One measure of usefulness.

    Attributes:
        before: The aligned model's report.
        after: The hardened model's.
    """

    before: UtilityReport | None = None
    after: UtilityReport | None = None


@dataclass(frozen=True)
class Evidence:
    """Everything that was measured.

    Attributes:
        safety: By set of prompts and judge.
        utility: By measure.
        stress: What fine-tuning attacks did to it.
        warnings: What a reader should know of where the figures come from.
        auto: What `lox-hf auto` chose and measured; its safety is among `safety` too.

    Example:
        >>> from lox_hf.hub.evidence import load_evidence
        >>> load_evidence(["before", "after"], aligned="org/aligned").after.asr  # doctest: +SKIP
    """

    safety: tuple[SafetyEvidence, ...] = ()
    utility: tuple[UtilityEvidence, ...] = ()
    stress: StressReport | None = None
    warnings: tuple[str, ...] = ()
    auto: AutoReport | None = None

    @property
    def before(self) -> SafetyReport | None:
        """Safety of the aligned model on the first set of prompts."""
        return self.safety[0].before if self.safety else None

    @property
    def after(self) -> SafetyReport | None:
        """Safety of the hardened model on the first set of prompts."""
        return self.safety[0].after if self.safety else None

    @property
    def measured(self) -> bool:
        """Whether anything was measured of the hardened model itself."""
        safe = any(item.after or item.comparison for item in self.safety)
        return safe or any(item.after for item in self.utility) or self.stress is not None


def load_evidence(
    paths: Iterable[str | Path],
    *,
    aligned: str | ModelReference | None = None,
    hardened: Sequence[str] = (),
) -> Evidence:
    """Read reports of `lox-hf asr`, `utility`, `stress` or `auto`, told apart by their fields.

    Args:
        paths: Files, and the folders of runs.
        aligned: The aligned model; what was measured of it is before, everything else is after.
        hardened: Names under which the hardened model may have been measured: its folder, its Hub id.

    Returns:
        The reports side by side.

    Raises:
        CheckpointError: If a file is no report, or a folder holds none.
        ConfigError: If two reports of one kind are of one model, so that nobody knows which is meant.
    """
    name = aligned.name_or_path if isinstance(aligned, ModelReference) else aligned
    found = [item for path in paths for item in _read(Path(path).expanduser())]
    safety = [(path, item) for path, item in found if isinstance(item, SafetyReport)]
    comparisons = [(path, item) for path, item in found if isinstance(item, SafetyComparison)]
    utility = [(path, item) for path, item in found if isinstance(item, AccuracyReport | PerplexityReport)]
    stress = [(path, item) for path, item in found if isinstance(item, StressReport)]
    autos = [(path, item) for path, item in found if isinstance(item, AutoReport)]
    _one_of("stress tests", stress)
    _one_of("reports of lox-hf auto", autos)
    measured = [*(item for _, item in safety), *(item for _, item in utility)]
    from_auto = [safety_evidence(item) for _, item in autos[:1] if item.after is not None]
    return Evidence(
        (*_safety(safety, comparisons, name), *from_auto),
        tuple(_utility(utility, name)),
        stress[0][1] if stress else None,
        tuple(_warnings(measured, stress[0][1] if stress else None, name, hardened)),
        autos[0][1] if autos else None,
    )


def same_model(name: str, other: str) -> bool:
    """Whether two names mean one model: equal, or paths of one folder."""
    if name == other:
        return True
    ours, theirs = Path(name).expanduser(), Path(other).expanduser()
    return ours.is_dir() and theirs.is_dir() and ours.resolve() == theirs.resolve()


def _read(path: Path) -> list[tuple[Path, Found]]:
    if path.is_dir():
        files = [path / name for name in RUN_FILES if (path / name).is_file()]
        if not files:
            raise CheckpointError(
                f"'{path}' holds no report: pass the folder of a run of lox-hf asr, utility, stress or auto, or its "
                "file."
            )
        return [item for file in files for item in _read(file)]
    try:
        found = _recognise(json.loads(path.read_text(encoding="utf-8")))
        for item in found:
            if isinstance(item, SafetyReport | AccuracyReport):
                _check_types(item)
        return [(path, item) for item in found]
    except OSError as error:
        raise CheckpointError(f"Cannot read the evaluation '{path}': {error.strerror or error}.") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"'{path}' is no report of lox-hf asr (report.json, comparison.json), utility (utility.json), stress "
            f"(results.json) or auto (report.json): {' '.join(str(error).split())[:200] or type(error).__name__}."
        ) from error


def _check_types(report: SafetyReport | AccuracyReport) -> None:
    """Refuse fields of another type than a card can show."""
    about = [report.questions] if isinstance(report, AccuracyReport) else [report.prompts, report.generation]
    texts = () if isinstance(report, AccuracyReport) else (report.judge, report.over_refusal_judge, *report.warnings)
    rates = [value for name in vars(report) if isinstance(value := getattr(report, name), Rate)]
    if (
        not all(isinstance(item, dict) for item in about)
        or not all(isinstance(item, str) for item in texts)
        or not all(isinstance(rate.n, int) and isinstance(rate.count, int) for rate in rates)
    ):
        raise TypeError("a field is of another type")


def _recognise(data: Any) -> list[Found]:
    """Build the record that has these fields."""
    if not isinstance(data, dict):
        raise TypeError("expected a JSON object")
    if "choices" in data and "attacked_differences" in data:
        return [AutoReport.from_dict(data)]
    if "findings" in data and "outcomes" in data:
        return [StressReport.from_dict(data)]
    if "asr" in data and "judge" in data:
        return [SafetyReport.from_dict(data)]
    if "asr" in data and "models" in data:
        return [SafetyComparison.from_dict(data)]
    if "accuracy" in data and "unreadable" in data:
        return [AccuracyReport.from_dict(data)]
    if "perplexity" in data and "tokens" in data:
        return [PerplexityReport.from_dict(data)]
    parts = [data[name] for name in ("gsm8k", "perplexity") if isinstance(data.get(name), dict)]
    if not parts:
        raise ValueError(f"its fields are {', '.join(sorted(map(str, data))[:8]) or 'none'}")
    return [item for part in parts for item in _recognise(part)]


def _safety(
    reports: list[tuple[Path, SafetyReport]], comparisons: list[tuple[Path, SafetyComparison]], aligned: str | None
) -> list[SafetyEvidence]:
    """Reports on the same prompts by the same judge belong together; a comparison belongs to the report after."""
    groups: dict[tuple[object, ...], list[tuple[Path, SafetyReport]]] = {}
    for path, report in reports:
        key = report.prompts.get("sha256"), report.judge, json.dumps(report.judge_settings, sort_keys=True)
        groups.setdefault(key, []).append((path, report))
    left, pairs = list(comparisons), []
    for group in groups.values():
        before, after = _sides("safety reports", group, aligned)
        fitting = [item for item in left if after is not None and _fits(item[1], before, after)]
        _one_of("comparisons", fitting)
        left = [item for item in left if item not in fitting]
        pairs.append(SafetyEvidence(before, after, fitting[0][1] if fitting else None))
    return pairs + [SafetyEvidence(comparison=item) for _, item in left]


def _fits(comparison: SafetyComparison, before: SafetyReport | None, after: SafetyReport) -> bool:
    """Whether a comparison is of these reports: by the models' names, and by its counts."""
    for name, report in zip(comparison.models, (before, after), strict=True):
        if (
            report is not None
            and report.model is not None
            and name
            and not same_model(name, report.model.name_or_path)
        ):
            return False
    return comparison.asr.after.n <= after.asr.n and comparison.asr.after.count <= after.asr.count


def _utility(reports: list[tuple[Path, UtilityReport]], aligned: str | None) -> list[UtilityEvidence]:
    groups: dict[tuple[object, ...], list[tuple[Path, UtilityReport]]] = {}
    for path, report in reports:
        texts = report.questions.get("sha256") if isinstance(report, AccuracyReport) else report.sha256
        groups.setdefault((type(report), texts), []).append((path, report))
    return [UtilityEvidence(*_sides("utility reports", group, aligned)) for group in groups.values()]


def _sides(what: str, group: list[tuple[Path, Any]], aligned: str | None) -> tuple[Any, Any]:
    """The report of the aligned model, and the other one."""
    before = [item for item in group if aligned and item[1].model and same_model(item[1].model.name_or_path, aligned)]
    after = [item for item in group if item not in before]
    _one_of(f"{what} of the aligned model", before)
    _one_of(f"{what} of the hardened model", after)
    return before[0][1] if before else None, after[0][1] if after else None


def _one_of(what: str, found: list[tuple[Path, Any]]) -> None:
    different = {item.to_json(): path for path, item in found}
    if len(different) > 1:
        paths = ", ".join(f"'{path}'" for path in different.values())
        raise ConfigError(f"Two {what} on the same thing were passed, {paths}: pass one.")


def _warnings(
    reports: list[Any], stress: StressReport | None, aligned: str | None, hardened: Sequence[str]
) -> list[str]:
    """Say what was measured under a name that is neither the aligned model's nor that of what is pushed."""
    names = {report.model.name_or_path if report.model else "" for report in reports}
    known = [*hardened, *([aligned] if aligned else [])]
    strangers = sorted(name for name in names if name and not any(same_model(name, other) for other in known))
    said = [
        f"The evaluation names '{name}' as the model that answered; that its weights are these was not checked."
        for name in strangers
        if hardened
    ]
    if "" in names:
        said.append("An evaluation does not say which model answered.")
    if stress is not None and aligned and not same_model(stress.aligned.name_or_path, aligned):
        said.append(f"The stress test names '{stress.aligned.name_or_path}' as the aligned model.")
    return said
