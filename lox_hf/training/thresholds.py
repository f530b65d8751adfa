"""`Threshold`: which figure of a reading is watched, and when it has gone too far."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from lox_hf.records import TrainingReading

NEEDS = {
    "retention": "",
    "r_ft": "base_model",
    "ratio": "base_model",
    "asr": "probe",
    "over_refusal": "probe",
    "refusal_perplexity": "probe",
}
"""The figures that can be watched, and the argument without which they are not measured."""


SHARES = ("asr", "over_refusal")


@dataclass(frozen=True)
class Threshold:
    """A limit of one figure; data only, so that the same readings always give the same decision.

    Args:
        metric: A figure of `TrainingReading.figures`: one of `NEEDS`.
        below: It is crossed by values under this one.
        above: It is crossed by values over this one; a threshold has one of the two, or neither and is never crossed.
        patience: Readings in a row that have to cross it.

    Example:
        >>> from lox_hf.records import DriftReading, TrainingReading
        >>> threshold = Threshold("retention", below=0.6)
        >>> threshold.is_crossed(TrainingReading(50, 0.5, "step", DriftReading(retention=0.5)))
        True
    """

    metric: str = "retention"
    below: float | None = None
    above: float | None = None
    patience: int = 1

    @property
    def is_set(self) -> bool:
        """Whether there is a limit."""
        return self.below is not None or self.above is not None

    def is_crossed(self, reading: TrainingReading) -> bool:
        """Tell whether a reading is beyond the limit; one that lacks the figure is not."""
        return self._is_beyond(reading.figures().get(self.metric, math.nan))

    def is_kept(self, reading: TrainingReading) -> bool:
        """Tell whether the model that a reading left, correction included, is known to be within the limit."""
        value = reading.figures().get(self.metric, math.nan)
        if reading.reapplied:  # what it answers with the correction was not asked
            value = reading.retention_after if self.metric == "retention" else math.nan
        return not math.isnan(value) and not self._is_beyond(value)

    def is_due(self, readings: Sequence[TrainingReading]) -> bool:
        """Tell whether the last readings, `patience` of them in a row, call for action.

        Args:
            readings: All readings so far, by step. A correction ends a row, as the weights were others after it; a
                reading that lacks the figure, such as one whose judge failed, is passed over.

        Returns:
            Whether they do.
        """
        if not readings or self.metric not in readings[-1].figures():
            return False
        known = [reading for reading in readings if self.metric in reading.figures()]
        row = takewhile(lambda place: self._goes_on(known, place), reversed(range(len(known))))
        return sum(1 for _ in row) >= self.patience

    def problems(self) -> list[str]:
        """Return what is wrong with the settings, a clause each."""
        found = []
        if not isinstance(self.metric, str) or self.metric not in NEEDS:
            found.append(f"metric is {self.metric!r}, expected one of {', '.join(NEEDS)}")
        if self.below is not None and self.above is not None:
            found.append(f"the threshold is given twice, below={self.below!r} and above={self.above!r}: give one")
        for name in ("below", "above"):
            value = getattr(self, name)
            if value is not None and not is_finite(value):
                found.append(f"{name} is {value!r}, expected a finite number")
            elif value is not None and self.metric in SHARES and value > 1:
                found.append(f"{name} is {value!r}, and {self.metric} is a share, at most 1: 10 % is 0.1")
        if not is_count(self.patience):
            found.append(f"patience is {self.patience!r}, expected a positive integer")
        return found

    def __str__(self) -> str:
        return f"{self.metric} below {self.below}" if self.below is not None else f"{self.metric} above {self.above}"

    def _is_beyond(self, value: float) -> bool:
        under = self.below is not None and value < self.below
        return under or (self.above is not None and value > self.above)

    def _goes_on(self, readings: Sequence[TrainingReading], place: int) -> bool:
        is_newest = place == len(readings) - 1
        return self.is_crossed(readings[place]) and (is_newest or not readings[place].reapplied)


def is_count(value: object) -> bool:
    """Whether this is a positive integer."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def is_finite(value: object) -> bool:
    """Whether this is a number, and no NaN or infinity."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
