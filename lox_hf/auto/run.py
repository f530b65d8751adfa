"""`auto_harden`: the whole way from an aligned model to a hardened one and a report, without a question asked."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from torch import nn

from lox_hf.analysis.directions import FOLDER_NAME, base_of
from lox_hf.analysis.formed import FormedModel
from lox_hf.analysis.points import PointJob, ScoreFn, measured
from lox_hf.analysis.select import select
from lox_hf.auto.differences import score_differences
from lox_hf.auto.halves import Halves
from lox_hf.auto.measures import CandidateMeasures
from lox_hf.auto.prepare import Prepared, prepare
from lox_hf.auto.report import HARDENED, REPORT_NAME, SELECTION, in_words, save_report, written_files
from lox_hf.auto.settings import AutoConfig
from lox_hf.auto.stops import ALIGNED, ATTACKED, BASE, NO_CHANGE, why_stop
from lox_hf.config import CONFIG_NAME, LoxConfig
from lox_hf.evaluation.data.prompts import Prompt
from lox_hf.evaluation.divergence import answer_reference
from lox_hf.harden import harden_checkpoint
from lox_hf.jobs import Runner
from lox_hf.records import AutoModel, AutoPlan, AutoReport, ModelReference, Score, Selection
from lox_hf.robustness.measuring.measure import ask_prompts
from lox_hf.run_folder import RunFolder
from lox_hf.subspace import SafetySubspace
from lox_hf.version import versions
from lox_hf.weights.identity import weights_sample
from lox_hf.weights.live import live_tensors
from lox_hf.weights.source import CheckpointSource, WeightSource

MOST_KL_PROMPTS = 100
"""What is kept of each is a number for every token of the vocabulary, at 16 places."""
Tell = Callable[[str], None]


def plan_auto(config: AutoConfig, output_dir: str | Path | None = None) -> AutoPlan:
    """Settle and check everything that `auto_harden` would, and measure nothing.

    Args:
        config: The settings.
        output_dir: Where the output would go; checked when given.

    Returns:
        What is settled, and how many models would be measured.

    Raises:
        LoxError: As `auto_harden` would.

    Example:
        >>> plan_auto(AutoConfig("org/aligned")).candidates  # doctest: +SKIP
        30
    """
    RunFolder(output_dir, {}).check()
    return prepare(config).plan()


def auto_harden(
    config: AutoConfig, output_dir: str | Path, *, tell: Tell | None = None, progressbar: bool | None = None
) -> AutoReport:
    r"""Choose how to harden an aligned model, harden it, and measure what came of it.

    The base is found, the change of alignment is decomposed once, r, alpha and the weights are chosen by
    `lox_hf.analysis.select.select` under its default limits and after a short attack, the checkpoint is hardened disk
    to disk, and both models are measured before and after the attack on prompts that nothing was chosen by. It stops
    early, with the reason in `stopped`, where hardening would not help. A killed run goes on with the same call; a
    finished one returns its report.

    Args:
        config: The settings.
        output_dir: Folder for `hardened/`, the checkpoint; `report.md`, `report.json`, `lox_config.json`, figures, and
            everything that was measured.
        tell: Called with what is settled and found, a line each, as it comes.
        progressbar: Show progress bars; None shows them on a terminal only.

    Returns:
        The report.

    Raises:
        ConfigError: If settings contradict each other, no base is named, or a package is missing.
        PromptError: If prompts or rows cannot be read.
        PairingError: If the two models do not fit.
        CheckpointError: If files are missing or damaged.
        UnsupportedModelError: If weights cannot be edited or trained.
        AlreadyHardenedError: If the aligned model is hardened already.
        NumericsError: If a matrix contains NaN or Inf, or overflows; it is named.
        OutputError: If the folder holds something else or another run, or cannot be written.

    Example:
        >>> report = auto_harden(AutoConfig("org/aligned"), "aligned-auto", tell=print)  # doctest: +SKIP
        >>> print(report.stopped or "\n".join(report.reasons))  # doctest: +SKIP

    Source: Perin et al., COLM 2025, sections 3 and 4; the order of the steps is this package's own.
    """
    RunFolder(output_dir, {}).check()  # before a model is loaded, and not only after it
    prepared = prepare(config)
    say = tell or (lambda _: None)
    for choice in prepared.choices():
        say(str(choice))
    with RunFolder(output_dir, prepared.settings()) as folder:
        finished = _finished(folder)
        if finished is not None:
            return finished
        run = _Run(prepared, folder, say, progressbar)
        report = run.report()
        save_report(report, run.selection, folder)
    return report


def _finished(folder: RunFolder) -> AutoReport | None:
    """The report of a run that got to its end, if what it made is still there."""
    text = folder.read(REPORT_NAME)
    report = AutoReport.from_json(text) if text else None
    is_there = (
        report is not None
        and folder.folder is not None
        and (report.config is None or (folder.folder / HARDENED).is_dir())
    )
    return report if is_there else None


class _Run:
    """One run in its order.

    Args:
        prepared: The checked run.
        folder: Its open folder.
        tell: Called with what is found.
        progressbar: Show progress bars.
    """

    def __init__(self, prepared: Prepared, folder: RunFolder, tell: Tell, progressbar: bool | None) -> None:
        self.prepared, self.folder, self.tell, self.progressbar = prepared, folder, tell, progressbar
        self.path = Path(str(folder.folder))
        self.aligned = str(prepared.config.aligned_model)
        self.formed = FormedModel(prepared.model, self.aligned, revision=prepared.config.revision)
        self.checked: dict[str, Score] = {}
        self.selection: Selection | None = None

    def report(self) -> AutoReport:
        """Go the whole way, or stop where it would not help."""
        stopped = self._check()
        if stopped:
            return self._report(stopped=stopped)
        selection = self.selection = self._select()
        if selection.recommended is None:
            return self._report(stopped=" ".join(selection.reasons), warnings=selection.warnings)
        config = self._harden(selection)
        before = self._both("aligned", self.formed.source)
        after = self._both("hardened", CheckpointSource(self.path / HARDENED, "the hardened model"))
        attacks = (before.attacked, after.attacked)
        return self._report(
            config=config.to_dict(),
            recommended=selection.recommended,
            reasons=selection.reasons,
            before=before,
            after=after,
            differences=score_differences(before.score, after.score),
            attacked_differences={} if None in attacks else score_differences(*attacks),  # type: ignore
            warnings=selection.warnings,
        )

    def _check(self) -> str:
        """Measure, on the prompts to choose by, what says whether hardening can help; the reason where it cannot."""
        if not self.prepared.is_changed():
            return NO_CHANGE
        measures, attack = self._measures["choosing"], self.prepared.attacks.get("choosing")
        steps: dict[str, tuple[WeightSource, ScoreFn]] = {
            ALIGNED: (self.formed.source, measures.score),
            BASE: (base_of(self.prepared.pair), partial(_safety, measures)),
        }
        if attack is not None:
            steps[ATTACKED] = (self.formed.source, attack.score)
        for name, (source, score_fn) in steps.items():
            self.checked[name] = self._score(f"choosing/{name}.json", source, score_fn)
            self._tell_score(name, self.checked[name])
            if reason := why_stop(self.checked):
                return reason
        return ""

    def _select(self) -> Selection:
        """Choose; what the checks have measured already is not measured again."""
        prepared, config = self.prepared, self.prepared.config
        measures, attack = self._measures["choosing"], prepared.attacks.get("choosing")
        known = weights_sample(prepared.model.named_parameters())
        return select(
            prepared.model,
            prepared.base.value,
            _remembering(measures.score, {known: self.checked[ALIGNED]}),
            rs=config.rs,
            alphas=config.alphas,
            targets=config.targets,
            limits=config.limits,
            attack_fn=None if attack is None else _remembering(attack.score, {known: self.checked[ATTACKED]}),
            config=LoxConfig(prepared.base.value, revision=config.base_revision),
            aligned_model=self.aligned,
            about=measures.settings(),
            attack_about=None if attack is None else attack.settings(),
            output_dir=self.path / SELECTION,
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
            progressbar=self.progressbar,
        )

    def _harden(self, selection: Selection) -> LoxConfig:
        """Harden disk to disk, along the directions that were found."""
        base, revision = self.prepared.base.value, self.prepared.config.base_revision
        chosen = LoxConfig.from_dict(selection.get(str(selection.recommended)).config)
        config = replace(chosen, base_model_name_or_path=base, revision=revision)
        self.tell(f"{'chosen':<8}  {selection.recommended}")
        for reason in selection.reasons:
            self.tell(f"{'':<8}  {reason}")
        if not (self.path / HARDENED).exists():
            # Shares of the energy have directions of their own, and the full rank has none.
            is_count = isinstance(config.r, int)
            harden_checkpoint(
                self.aligned,
                self.path / HARDENED,
                config,
                base_model=SafetySubspace.from_pretrained(self.path / SELECTION / FOLDER_NAME) if is_count else None,
                revision=self.prepared.config.revision,
                trust_remote_code=self.prepared.config.trust_remote_code,
                progressbar=self.progressbar,
            )
        self.folder.write(CONFIG_NAME, config.to_json())
        return config

    def _both(self, name: str, source: WeightSource) -> AutoModel:
        """Measure a model on the prompts to report on, before and after the attack."""
        measures, attack = self._measures["reporting"], self.prepared.attacks.get("reporting")
        score = self._score(f"reporting/{name}.json", source, measures.score)
        self._tell_score(name, score)
        if attack is None:
            return AutoModel(score)
        attacked = self._score(f"reporting/{name}-attacked.json", source, attack.score)
        self._tell_score("attacked", attacked)
        return AutoModel(score, attacked)

    def _score(self, path: str, source: WeightSource, score_fn: ScoreFn) -> Score:
        """Measure a model whose weights are read into the loaded one, which has its own back afterwards."""

        def measure() -> Score:
            theirs = source.infos()
            with self.formed.restored_afterwards():
                self.formed.mix([(source, 1.0)], names=[n for n in live_tensors(self.formed.model) if n in theirs])
                return measured(score_fn, self.formed.model)

        runner: Runner[Score] = Runner(self.folder, progressbar=self.progressbar)
        return runner.results([PointJob(path, {}, measure)], f"Measuring {path.removesuffix('.json')}", "model")[0]

    @cached_property
    def _measures(self) -> dict[str, CandidateMeasures]:
        """What is measured before any attack, by half; made while the loaded model is the aligned one."""
        return {half: self._candidate_measures(getattr(self.prepared.halves, half)) for half in Halves._fields}

    def _candidate_measures(self, prompts: tuple[Prompt, ...]) -> CandidateMeasures:
        prepared, config, reference = self.prepared, self.prepared.config, None
        if prepared.has_harmless:
            harmless = [prompt for prompt in prompts if not prompt.harmful][:MOST_KL_PROMPTS]
            asked = {name: getattr(config, name) for name in ("template", "system_prompt", "batch_size")}
            reference = answer_reference(prepared.model, prepared.tokenizer, harmless, **asked)
        return CandidateMeasures(prepared.measurement(prompts), prepared.tokenizer, reference)

    def _tell_score(self, name: str, score: Score) -> None:
        self.tell(f"{name:<8}  {in_words(score)}")

    def _report(self, **found: Any) -> AutoReport:
        prepared = self.prepared
        return AutoReport(
            aligned=prepared.pair.aligned.reference,
            base=prepared.pair.factors.reference or ModelReference(prepared.base.value),
            choices=prepared.choices(),
            checked=self.checked,
            files=written_files(self.selection),
            settings=prepared.settings(),
            versions=versions("transformers", "trl"),
            **found,
        )


def _safety(measures: CandidateMeasures, model: Any) -> Score:
    """Safety alone: what the base is good for, and how far it is from the aligned model, decides nothing."""
    return Score.of(ask_prompts(model, measures.tokenizer, measures.measurement))


def _remembering(score_fn: ScoreFn, known: Mapping[str, Score]) -> ScoreFn:
    """The measure, but for models that are known by a sample of their weights."""

    def score(model: nn.Module) -> Any:
        found = known.get(weights_sample(model.named_parameters()))
        return score_fn(model) if found is None else found

    return score
