"""Checkpoints of a run: which one holds the weights of a reading, and what loading one leaves out."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lox_hf.records import TrainingReading
from lox_hf.training.backends.correction_adapter import CORRECTION, activate_correction
from lox_hf.training.reporter import PREFIX

STATE_NAME = "trainer_state.json"
"""The trainer writes it last, so a checkpoint without it is not complete."""


def newest_checkpoint(output_dir: Path, readings: Iterable[TrainingReading]) -> Path | None:
    """Return the newest checkpoint that is still there and holds the weights of one of these readings.

    Args:
        output_dir: The trainer's output folder.
        readings: The readings that come into question.

    Returns:
        Its folder; None where there is none. One that an older run left, or a kill cut short, does not count: the
        history in a checkpoint has the row of its own reading.

    Example:
        >>> newest_checkpoint(Path("no-such-folder"), []) is None
        True
    """
    for reading in sorted(readings, key=lambda reading: reading.step, reverse=True):
        folder = output_dir / f"checkpoint-{reading.step}"
        if _has_row(folder / STATE_NAME, reading):
            return folder
    return None


def load_correction(model: Any, checkpoint: Path) -> None:
    """Load the correction of a PeftModel from a checkpoint, of which a Trainer that loads the best model takes none.

    It loads the first adapter alone, and the correction would still be that of the last step.

    Args:
        model: The model in training; nothing is done to one that has no correction.
        checkpoint: The checkpoint that was loaded; one without a correction was saved before there was any.
    """
    if CORRECTION not in getattr(model, "peft_config", {}):
        return
    folder = checkpoint / CORRECTION
    if folder.is_dir():
        model.load_adapter(folder, CORRECTION)
        activate_correction(model)
    else:
        model.delete_adapter(CORRECTION)


def _has_row(path: Path, reading: TrainingReading) -> bool:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["log_history"]
        wanted = {"step": reading.step} | {PREFIX + name: value for name, value in reading.figures().items()}
        return any(wanted.items() <= row.items() for row in rows)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # not there, or no trainer has written it
        return False
