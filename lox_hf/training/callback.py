"""`LoxCallback`: safety is watched while a model is trained by transformers or TRL, and kept if that is asked for."""

import logging
import math
import warnings
from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from torch import Tensor, nn
from transformers import TrainerCallback

from lox_hf.config import LoxConfig
from lox_hf.errors import ConfigError, listing
from lox_hf.records import TrainingReading
from lox_hf.subspace import SafetySubspace
from lox_hf.training.alignment import HardenAfter
from lox_hf.training.backends.correction_adapter import activate_correction
from lox_hf.training.checkpoints import load_correction, newest_checkpoint
from lox_hf.training.correction import off_target, start_coordinates, targets
from lox_hf.training.directions import find_directions
from lox_hf.training.journal import Journal, first_of_steps
from lox_hf.training.monitor import DriftMonitor
from lox_hf.training.processes import from_process_zero
from lox_hf.training.reference import warn_of_reference
from lox_hf.training.reporter import PREFIX, Reporter
from lox_hf.training.settings import setting_problems
from lox_hf.training.thresholds import Threshold
from lox_hf.training.watch import Watch

if TYPE_CHECKING:
    from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

    from lox_hf.training.probe import SafetyProbe

logger = logging.getLogger(__name__)


class LoxCallback(TrainerCallback):
    """Reads how much of a model's alignment is left while it is fine-tuned; logs it, stops there, or brings it back.

    Readings are taken before the first step, every `every_n_steps` or at the end of each epoch, at evaluations, before
    saves and at the end; at most one a step. Each is a row with keys "lox/..." in the trainer's history, and a line
    with the values of every matrix in output_dir/lox/readings.jsonl. A resumed run goes on where its checkpoint was.

    Retention measures what is left along the directions in which alignment moved the weights. Fine-tuning attacks can
    undo a model's safety and leave almost all of it (0.97 at an attack success rate of 99 % in our measurements), so a
    high retention does not mean a safe model; the ratio R_ft / R_align falls more, and a probe asks the model itself.

    Args:
        subspace: Directions of the aligned model: loaded, a folder or Hub id; or a `LoxConfig`, with which they are
            found as training begins, between the model as it is then and the base that is named.
        action: "log" does nothing else. "stop" ends the training with a save once the threshold is crossed. "reapply"
            adds U_k (T - C) V_k^T, which brings the coordinates C back to T, at readings that cross the threshold;
            without a threshold at the end only.
        metric: The figure that is watched: "retention"; "r_ft" or "ratio", which need `base_model`; "asr",
            "over_refusal" or "refusal_perplexity", which need `probe`.
        below: The threshold is crossed under this value.
        above: The threshold is crossed over this value.
        patience: Readings in a row that have to cross it.
        every_n_steps: Optimiser steps between readings; None reads at the end of each epoch.
        strength: Retention that "reapply" restores: 1 is the aligned model's, 1 + alpha that of a hardened one. None
            restores the coordinates that the model had at the start.
        base_model: The model before alignment. Where it is given, R_ft, R_align and their ratio are read too; it is
            streamed, so a reading takes as long as reading its files.
        probe: A few prompts that the model is asked at every reading.
        harden_after: For the training that makes the aligned model: it is not watched, and hardened at its end with
            the settings of the `LoxConfig` and against its base, or `base_model`.
        token: Hub token; None uses the stored login.

    Attributes:
        readings: What was read in this run, and before it where it was resumed; the values of single matrices are in
            the file alone.

    Raises:
        ConfigError: If arguments are out of range or contradict each other; all of them are listed.
        CheckpointError: If the subspace cannot be read.

    Example:
        >>> callback = LoxCallback("subspace", "stop", below=0.6, patience=2, every_n_steps=50)  # doctest: +SKIP
        >>> callback.attach(trainer)  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
        >>> callback.readings[-1].drift.retention  # doctest: +SKIP
        0.93
    """

    def __init__(
        self,
        subspace: SafetySubspace | LoxConfig | str | Path,
        action: str = "log",
        *,
        metric: str = "retention",
        below: float | None = None,
        above: float | None = None,
        patience: int = 1,
        every_n_steps: int | None = None,
        strength: float | None = None,
        base_model: str | Path | nn.Module | Mapping[str, Tensor] | None = None,
        probe: "SafetyProbe | None" = None,
        harden_after: bool = False,
        token: str | bool | None = None,
    ) -> None:
        self.action, self.threshold = action, Threshold(metric, below, above, patience)
        self.every_n_steps, self.strength, self.token = every_n_steps, strength, token
        self.base_model, self.probe = base_model, probe
        given = {"every_n_steps": every_n_steps, "strength": strength, "base_model": base_model, "probe": probe}
        if problems := setting_problems(subspace, action, self.threshold, given, harden_after):
            raise ConfigError(f"Invalid LoxCallback: {listing(problems)}")
        if isinstance(subspace, str | Path):
            subspace = SafetySubspace.from_pretrained(subspace, token=token)
        self.subspace = subspace
        self.readings: list[TrainingReading] = []
        self._harden_after: HardenAfter | None = None
        if harden_after and isinstance(subspace, LoxConfig):
            self._harden_after = HardenAfter(subspace, token, base_model=base_model)
        self._reporter = Reporter()
        self._journal: Journal | None = None
        self._watch: Watch | None = None
        self._stopped_at: int | None = None
        self._saved_at: int | None = None

    def attach(self, trainer: "Trainer") -> Self:
        """Let rows reach the trainer's trackers too; without it they reach its history only.

        Args:
            trainer: The trainer; the callback is added to it where it is not there yet.

        Returns:
            This callback.

        Raises:
            ConfigError: If this is no trainer.
        """
        if not hasattr(trainer, "callback_handler"):
            raise ConfigError(f"attach takes a transformers or TRL trainer, got {type(trainer).__name__}.")
        self._reporter.trainer = trainer
        if self not in trainer.callback_handler.callbacks:
            trainer.add_callback(self)
        warn_of_reference(trainer)
        return self

    @property
    def last_safe_checkpoint(self) -> Path | None:
        """The newest checkpoint of this run that is still there and was measured to be within the threshold.

        None where there is none, and where no threshold says what is safe.
        """
        if self._journal is None or not self.threshold.is_set:
            return None
        saved = first_of_steps(self.readings)
        return newest_checkpoint(self._journal.folder.parent, filter(self.threshold.is_kept, saved))

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **found: Any) -> None:
        """Check that everything fits, and read the model before the first step."""
        if self._harden_after is not None:
            self._harden_after.check(model)
            return
        self._begin(args, state, model, found.get("processing_class"))
        if state.global_step == 0:
            self._look("begin", args, state, control)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Read where this step is one of `every_n_steps`, or is saved, or is the last."""
        is_due = self.every_n_steps is not None and state.global_step % self.every_n_steps == 0
        self._look_before_save("step" if is_due else None, args, state, control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Read where epochs are asked for, or this one is saved, or is the last."""
        self._look_before_save("epoch" if self.every_n_steps is None else None, args, state, control)
        # An evaluation decides about saving by itself, also at the step at which this callback stops.
        control.should_save |= self._stopped_at == state.global_step != self._saved_at

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
        """Read, and put the figures among the metrics, where `metric_for_best_model` finds them."""
        self._look("evaluate", args, state, control)
        if self._watch is not None and metrics is not None:
            metrics |= self._evaluation(self.readings[-1])

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Read what another callback has saved at a step that was not read; it is too late to act on it."""
        self._saved_at = state.global_step
        self._look("save", args, state, control, may_act=False)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Read the model that training leaves, and draw the run; or harden it."""
        if self._harden_after is not None:
            self._harden_after.harden(model)
            return
        best = state.best_model_checkpoint if args.load_best_model_at_end else None
        if best is not None:
            load_correction(model, Path(best))
        is_other = best is not None and state.best_global_step != state.global_step
        try:
            self._look("end", args, state, control, is_other_model=is_other)
            self._draw()
        finally:
            self._watch = None

    def _begin(self, args: "TrainingArguments", state: "TrainerState", model: nn.Module, tokenizer: Any) -> None:
        model = getattr(model, "_orig_mod", model)  # compiled or not
        journal = Journal(str(args.output_dir), writes=args.should_save)
        is_resumed = state.global_step > 0
        if is_resumed:
            activate_correction(model)
        subspace = self._directions(model, journal, is_resumed)
        watch = Watch(model, DriftMonitor(model, subspace, self.base_model, token=self.token), tokenizer, self.probe)
        watch.check(self.threshold.metric)
        start = self._start(watch.monitor, journal, is_resumed)
        watch.targets = targets(subspace, self.strength, start)
        if self.action == "reapply":  # now, and not when hours of training have gone by
            watch.monitor.weights.check_add(off_target(subspace, watch.targets, start))
        self._reporter.check(args, state)
        if is_resumed:
            self.readings = from_process_zero(lambda: journal.resume(state.global_step))
        else:  # now that nothing is in the way, what an older run left may go
            self.readings = []
            journal.restart(subspace if self.subspace is not subspace else None, start)
        self._stopped_at = self._saved_at = None
        self._journal, self._watch = journal, watch

    def _directions(self, model: nn.Module, journal: Journal, is_resumed: bool) -> SafetySubspace:
        if isinstance(self.subspace, SafetySubspace):
            return self.subspace
        if is_resumed:  # the model has moved since they were found
            return from_process_zero(journal.load_directions)
        return find_directions(model, self.subspace, self.base_model, token=self.token)

    def _start(self, monitor: DriftMonitor, journal: Journal, is_resumed: bool) -> dict[str, Tensor]:
        if self.action != "reapply":
            return {}
        if is_resumed and self.strength is None:
            return from_process_zero(journal.load_start)
        return start_coordinates(monitor.weights, monitor.subspace)

    def _look_before_save(self, moment: str | None, args: Any, state: Any, control: Any) -> None:
        """Read before the checkpoint is written, so that it holds the row and the correction."""
        if control.should_training_stop:
            self._look("end", args, state, control)
        elif moment is not None or control.should_save:
            self._look(moment or "save", args, state, control)

    def _look(
        self,
        moment: str,
        args: "TrainingArguments",
        state: "TrainerState",
        control: "TrainerControl",
        *,
        may_act: bool = True,
        is_other_model: bool = False,
    ) -> None:
        """Take a reading, unless this step has one, and act on it."""
        if self._watch is None or self._journal is None:  # not in training: `evaluate` on its own
            return
        is_last_correction = moment == "end" and self.action == "reapply" and not self.threshold.is_set
        is_read = bool(self.readings) and self.readings[-1].step == state.global_step
        is_finished = is_read and (self.readings[-1].moment == "end" or not is_last_correction)
        if is_finished and not is_other_model:
            return
        reading = self._watch.read(state, moment)
        reading = replace(reading, tripped=self.threshold.is_crossed(reading))
        is_due = may_act and moment != "begin" and self.threshold.is_due([*self.readings, reading])
        if self.action == "reapply" and (is_due or is_last_correction):
            reading = self._watch.correct(reading)
            control.should_save |= is_read and args.save_strategy != "no"  # this step may be saved without it
        self._keep(reading, state)
        if self.action == "stop" and is_due and not is_other_model:
            control.should_training_stop = control.should_save = True
            self._stopped_at = state.global_step
            self._warn_of_stop(reading)

    def _keep(self, reading: TrainingReading, state: "TrainerState") -> None:
        """Write a reading down; its matrices stay on disk alone, or long runs would fill the memory with them."""
        if self._journal is not None:
            self._journal.append(reading)
        self.readings.append(replace(reading, drift=replace(reading.drift, tensors=())))
        self._reporter.report(reading.figures(), state)

    def _evaluation(self, reading: TrainingReading) -> dict[str, float]:
        """A reading as metrics of the model that is saved next: with its correction; NaN where a judge failed."""
        figures = reading.figures()
        if reading.reapplied:
            figures["retention"] = reading.retention_after
        figures = {self.threshold.metric: math.nan} | figures
        if self.probe is not None:
            figures = dict.fromkeys(("asr", "over_refusal", "refusal_perplexity"), math.nan) | figures
        return {f"eval_{PREFIX}{name}": value for name, value in figures.items()}

    def _warn_of_stop(self, reading: TrainingReading) -> None:
        safe = self.last_safe_checkpoint
        way = (
            f"The last safe checkpoint is {safe}."
            if safe
            else "No safe checkpoint is there: save more often (save_strategy='steps', save_steps) and keep more of "
            "them (save_total_limit) to have one to go back to."
        )
        times = f" at {self.threshold.patience} readings in a row" if self.threshold.patience > 1 else ""
        warnings.warn(
            f"LoxCallback stops the training at step {reading.step}: {self.threshold}{times}, at last "
            f"{reading.figures()[self.threshold.metric]:.4g}. {way}",
            stacklevel=2,
        )

    def _draw(self) -> None:
        if self._journal is None or not self._journal.writes:
            return
        if find_spec("matplotlib") is None:
            logger.info("No plot of the run is drawn, as matplotlib is not installed: pip install 'lox-hf[plot]'.")
            return
        from lox_hf.plots.drift import save_drift_plot

        try:
            save_drift_plot(self.readings, self._journal.plot_stem)
        except Exception as error:  # a figure is not worth a training
            warnings.warn(f"No plot of the run is drawn: {error}", stacklevel=2)
