"""`Reporter`: readings as rows of the trainer's history and of its trackers, and no row of its own is lost by it."""

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import Trainer, TrainerState, TrainingArguments

PREFIX = "lox/"


class Reporter:
    """Where readings are logged.

    Hooks of a callback are not given the trainer, and without it a row reaches the history but no tracker.

    Attributes:
        trainer: The trainer it is attached to; None where it is not.
    """

    def __init__(self) -> None:
        self.trainer: Trainer | None = None

    def check(self, args: "TrainingArguments", state: "TrainerState") -> None:
        """Say so where trackers will not get any rows.

        Args:
            args: The trainer's arguments.
            state: Its state.
        """
        trackers = [name for name in args.report_to or [] if name != "none"]
        if trackers and self._attached(state) is None:
            warnings.warn(
                f"LoxCallback is not attached to the trainer, so its rows do not reach {', '.join(trackers)}: call "
                "callback.attach(trainer) before trainer.train(). The trainer's history and output_dir/lox get them.",
                stacklevel=2,
            )

    def report(self, figures: Mapping[str, float], state: "TrainerState") -> None:
        """Log one row, each figure under "lox/" and its name.

        Args:
            figures: What was measured.
            state: The trainer's state.
        """
        row = {PREFIX + name: value for name, value in figures.items()}
        trainer = self._attached(state)
        if trainer is None:
            state.log_history.append({**row, "epoch": state.epoch, "step": state.global_step})
            return
        from transformers import Trainer

        should_log = trainer.control.should_log
        # The base class's own: TRL's would put its running means into this row, and the loss row would lack them.
        Trainer.log(trainer, row)
        trainer.control.should_log = should_log  # logging clears it, and then the loss row of this step is not written

    def _attached(self, state: "TrainerState") -> "Trainer | None":
        """The trainer, if it is the one that is training."""
        return self.trainer if self.trainer is not None and self.trainer.state is state else None
