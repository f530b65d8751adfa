"""`stress_test`: the whole matrix, cell by cell, each on disk as soon as it is done."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lox_hf.jobs import Runner
from lox_hf.records import CellResult, StressReport
from lox_hf.robustness.cells import Before, BeforeJob, CellJob
from lox_hf.robustness.findings.learning_rates import worst_learning_rate
from lox_hf.robustness.findings.summary import summarise
from lox_hf.robustness.matrix import Matrix, PlannedAttack, open_matrix
from lox_hf.robustness.prepare import ControlJob, DirectionsJob
from lox_hf.robustness.report.render import save_report
from lox_hf.robustness.settings import StressConfig
from lox_hf.robustness.subject import Subject
from lox_hf.run_folder import RunFolder
from lox_hf.version import versions

WORK_NAME = "work"
WEIGHTS_NAME = "weights"


def stress_test(config: StressConfig, output_dir: str | Path, *, progressbar: bool | None = None) -> StressReport:
    r"""Attack an aligned model, its hardened forms and the controls by fine-tuning, and say what came out.

    Every finished cell of the matrix is a file: a killed run goes on with the same call, and a finished one takes
    further attacks, seeds, learning rates and models without doing again what is there. Seeds fix everything on one
    machine. The weights of attacked models are dropped unless `config.keep_weights` is set.

    Args:
        config: The matrix.
        output_dir: Folder for `results.json`, `report.md`, `report.html`, `figures/` and every cell.
        progressbar: Show progress bars; None shows them on a terminal only.

    Returns:
        The report.

    Raises:
        ConfigError: If settings contradict each other, an attack or a control is not known, or a package is missing.
        PromptError: If prompts or rows cannot be read.
        CheckpointError: If a model cannot be read.
        PairingError: If the two models of a pair do not fit.
        UnsupportedModelError: If weights cannot be edited or trained.
        OutputError: If the folder holds something else or another run, or cannot be written.

    Example:
        >>> config = StressConfig("org/aligned", "org/base", ["gsm8k", "dolly"])  # doctest: +SKIP
        >>> print("\n".join(stress_test(config, "stress").headline))  # doctest: +SKIP

    Source: Perin et al., COLM 2025, section 4.
    """
    folder = RunFolder(output_dir, {"run": "stress test"})
    folder.check()
    output = Path(output_dir).expanduser().absolute()
    matrix = open_matrix(config, output / WORK_NAME)
    with folder, Runner(folder, config.workers, progressbar).started() as runner:
        test = _Test(matrix, runner, output / WEIGHTS_NAME if config.keep_weights else None)
        cells = test.run()
        report = summarise(
            cells,
            aligned=matrix.aligned,
            base=matrix.base,
            settings=matrix.settings,
            notes=test.notes(),
            not_run=matrix.not_run,
            versions=versions("transformers", "trl", "peft"),
        )
        save_report(report, folder)
        shutil.rmtree(matrix.work, ignore_errors=True)
    return report


class _Test:
    """The jobs of a matrix in their order.

    Args:
        matrix: The matrix.
        runner: What runs them.
        weights: Where attacked models are kept; None drops them.
    """

    def __init__(self, matrix: Matrix, runner: Runner, weights: Path | None) -> None:
        self.matrix, self.runner, self.weights = matrix, runner, weights
        self.subjects = [subject for subjects in matrix.subjects.values() for subject in subjects]
        self.before: dict[tuple[str, int], Before] = {}

    def run(self) -> list[CellResult]:
        """Measure every model, let the scanning seeds meet all learning rates, and the others the worst of them."""
        self.notes()  # controls that were trained otherwise are refused before any work
        jobs = [BeforeJob(subject, self.matrix.measurement) for subject in self.subjects]
        before = self._results(jobs, "Before the attacks", "model")
        self.before = dict(zip(map(_key, self.subjects), before, strict=True))
        scanning = self.matrix.config.scanning_seeds
        scanned = self._results(
            [
                self._cell(subject, planned, rate)
                for subject in self.subjects
                if subject.seed in scanning
                for planned in self.matrix.attacks_on(subject)
                for rate in planned.learning_rates
            ],
            "Attacking",
            "cell",
        )
        utility = {subject.seed: self.before[_key(subject)].utility for subject in self._of_kind("aligned")}
        rest = [
            self._cell(subject, planned, worst_learning_rate(_cells_of(scanned, subject, planned), utility))
            for subject in self.subjects
            if subject.seed not in scanning
            for planned in self.matrix.attacks_on(subject)
        ]
        return [*scanned, *self._results(rest, "Attacking the other seeds", "cell")]

    def notes(self) -> list[str]:
        """What a reader should know of the controls that were trained."""
        found = [self.runner.kept(job) for job in self._controls(self.subjects)]
        return [prepared.note for prepared in found if prepared is not None and prepared.note]

    def _results(self, jobs: Sequence[Any], description: str, unit: str) -> list[Any]:
        """Results of measuring jobs; what the missing ones need is made first."""
        needing = [job.subject for job in jobs if not self.runner.is_done(job)]
        self.runner.results(self._directions(needing), "Finding directions", "pair")
        self.runner.results(self._controls(needing), "Training controls", "model")
        return self.runner.results(jobs, description, unit)

    def _directions(self, subjects: Sequence[Subject]) -> list[DirectionsJob]:
        """One for every pair and every set of directions, however many models use them."""
        wanted = {}
        for subject in subjects:
            for lox in (subject.variant.config, subject.directions):
                if lox is not None and lox.r is not None:
                    job = DirectionsJob(subject, lox)
                    wanted.setdefault(job.path, job)
        return list(wanted.values())

    def _controls(self, subjects: Sequence[Subject]) -> list[ControlJob]:
        config = self.matrix.config
        trained = {_key(subject): subject for subject in subjects if subject.variant.is_trained}
        return [
            ControlJob(
                subject,
                config.control_training,
                self.matrix.measurement,
                self.matrix.control_rows[subject.variant.kind],
                str(config.safety_data),
                str(config.calibration_data),
            )
            for subject in trained.values()
        ]

    def _cell(self, subject: Subject, planned: PlannedAttack, learning_rate: float) -> CellJob:
        return CellJob(
            subject,
            planned.attack,
            planned.rows,
            learning_rate,
            self.matrix.config.readings,
            self.matrix.measurement,
            self.before[_key(subject)],
            self.weights,
        )

    def _of_kind(self, kind: str) -> list[Subject]:
        return [subject for subject in self.subjects if subject.variant.kind == kind]


def _key(subject: Subject) -> tuple[str, int]:
    return subject.variant.name, subject.seed


def _cells_of(cells: Sequence[CellResult], subject: Subject, planned: PlannedAttack) -> list[CellResult]:
    """The cells of one model under one attack."""
    wanted = subject.variant.name, planned.attack.name
    return [cell for cell in cells if (cell.model, cell.attack) == wanted]
