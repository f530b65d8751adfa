"""`Journal`: what has to outlive the process that trains, in a folder beside the checkpoints."""

import json
import os
import shutil
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lox_hf.errors import CheckpointError
from lox_hf.records import TrainingReading
from lox_hf.weights.output_file import output_errors

if TYPE_CHECKING:
    from lox_hf.subspace import SafetySubspace

FOLDER_NAME = "lox"
READINGS_NAME = "readings.jsonl"
SUBSPACE_FOLDER = "subspace"
START_NAME = "start.safetensors"
PLOT_STEM = "drift"


class Journal:
    """The readings of one training run, a line each, with the directions and the coordinates that it started from.

    Args:
        output_dir: The trainer's output folder; everything is in its subfolder "lox".
        writes: Whether this process writes. All processes read, so they have to see the same folder.

    Attributes:
        folder: The subfolder.

    Example:
        >>> import tempfile
        >>> from lox_hf.records import DriftReading
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     journal = Journal(folder)
        ...     journal.restart()
        ...     journal.append(TrainingReading(0, 0.0, "begin", DriftReading(retention=1.0)))
        ...     journal.append(TrainingReading(9, 0.9, "step", DriftReading(retention=0.8)))
        ...     [reading.step for reading in journal.resume(step=5)]
        [0]
    """

    def __init__(self, output_dir: str | Path, *, writes: bool = True) -> None:
        self.folder, self.writes = Path(output_dir) / FOLDER_NAME, writes
        self._is_full = False

    @property
    def subspace_folder(self) -> Path:
        """Where directions that were found at the start are kept."""
        return self.folder / SUBSPACE_FOLDER

    @property
    def plot_stem(self) -> Path:
        """Where the figure of the run belongs, without a suffix."""
        return self.folder / PLOT_STEM

    def restart(self, directions: "SafetySubspace | None" = None, start: Mapping[str, Tensor] | None = None) -> None:
        """Remove what an older run left, and nothing else that lies in the folder; keep what this one starts with.

        Args:
            directions: Directions that were found for this run.
            start: Where the model stands, by matrix name, as `correction.start_coordinates` returns it.

        Raises:
            OutputError: If the folder cannot be written.
        """
        if not self.writes:
            return
        with output_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            for name in (START_NAME, f"{PLOT_STEM}.png", f"{PLOT_STEM}.svg"):
                (self.folder / name).unlink(missing_ok=True)
            self._write([])
            if start:
                partial = self._partial(START_NAME)
                save_file({name: tensor.contiguous() for name, tensor in start.items()}, partial)
                os.replace(partial, self.folder / START_NAME)
        if directions is not None:  # without, the folder may be the one that the user's own directions come from
            with output_errors(self.folder), suppress(FileNotFoundError):
                shutil.rmtree(self.subspace_folder)
            directions.save_pretrained(self.subspace_folder)

    def resume(self, step: int) -> list[TrainingReading]:
        """Drop what was read after a step, and return the rest.

        Args:
            step: Step of the checkpoint from which training goes on.

        Returns:
            Readings up to that step, without their matrices; none where there is no file.

        Raises:
            CheckpointError: If the file is damaged.
            OutputError: If the folder cannot be written.
        """
        kept = [reading for reading in first_of_steps(self._read()) if reading.step <= step]
        if self.writes:
            with output_errors(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
                self._write(kept)
        return [replace(reading, drift=replace(reading.drift, tensors=())) for reading in kept]

    def append(self, reading: TrainingReading) -> None:
        """Add one reading; a kill loses no more than the line it interrupts. A full disk is warned of, once.

        Args:
            reading: The reading.
        """
        if not self.writes or self._is_full:
            return
        try:
            with self._readings.open("a", encoding="utf-8") as file:
                file.write(_line(reading))
        except OSError as error:  # a training of hours is worth more than the record of it
            self._is_full = True
            warnings.warn(
                f"{self._readings} does not take any more readings ({error}); they go to the trainer's history only.",
                stacklevel=2,
            )

    def load_directions(self) -> "SafetySubspace":
        """Read the directions that were found at the start.

        Returns:
            The directions.

        Raises:
            CheckpointError: If they are not there, or damaged.
        """
        from lox_hf.subspace import SafetySubspace

        try:
            return SafetySubspace.from_pretrained(self.subspace_folder)
        except CheckpointError as error:
            raise CheckpointError(
                f"Cannot read {self.subspace_folder}, where the run that is resumed kept its directions: {error} "
                "Resume in its output_dir, or pass a SafetySubspace in place of the LoxConfig."
            ) from error

    def load_start(self) -> dict[str, Tensor]:
        """Read where the model stood before the first step.

        Returns:
            Coordinates by matrix name.

        Raises:
            CheckpointError: If there is no such file, or it is damaged.
        """
        path = self.folder / START_NAME
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"Cannot read {path}, where the run that is resumed kept the coordinates it started from: {error}. "
                "Pass strength, so that they are not needed, or train from the beginning."
            ) from error

    @property
    def _readings(self) -> Path:
        return self.folder / READINGS_NAME

    def _partial(self, name: str) -> Path:
        return self.folder / f".{name}.partial"

    def _read(self) -> list[TrainingReading]:
        try:
            lines = self._readings.read_text(encoding="utf-8", errors="replace").split("\n")
        except FileNotFoundError:
            return []
        whole = lines[:-1]  # what follows the last end of line was cut short by a kill
        readings = []
        for number, line in enumerate(whole, start=1):
            try:
                readings.append(TrainingReading.from_json(line))
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise CheckpointError(
                    f"Line {number} of {self._readings} is no reading ({error}): remove the line, or the file, to go "
                    "on without it."
                ) from error
        return readings

    def _write(self, readings: Sequence[TrainingReading]) -> None:
        partial = self._partial(READINGS_NAME)
        partial.write_text("".join(map(_line, readings)), encoding="utf-8")
        os.replace(partial, self._readings)


def first_of_steps(readings: Iterable[TrainingReading]) -> list[TrainingReading]:
    """Return the readings of what checkpoints hold: a second one of a step is of the best model, loaded at the end.

    Args:
        readings: Readings by step.

    Returns:
        The first of each step.
    """
    found: dict[int, TrainingReading] = {}
    for reading in readings:
        found.setdefault(reading.step, reading)
    return list(found.values())


def _line(reading: TrainingReading) -> str:
    """One line of strict JSON."""
    return json.dumps(json.loads(reading.to_json())) + "\n"
