"""The measuring pieces of a stress test: a model before any attack, and one attack on it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from lox_hf.errors import PromptError
from lox_hf.records import CellResult, DriftReading, JsonRecord, StepReading, UtilityScore
from lox_hf.robustness.attacks.examples import rows_hash
from lox_hf.robustness.attacks.rows import Attack, encode_examples, load_attack
from lox_hf.robustness.finetuning.finetune import fine_tune, planned_steps
from lox_hf.robustness.measuring.measure import Measurement, measure_task, measure_utility, read_safety
from lox_hf.robustness.subject import Subject, save_checkpoint, slug


@dataclass(frozen=True)
class Before(JsonRecord):
    """A model before any attack.

    Attributes:
        reading: Its safety.
        utility: Its utility.
        drift: Its drift, without its matrices.
    """

    reading: StepReading
    utility: UtilityScore
    drift: DriftReading

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Build the record with its nested records."""
        return cls(
            StepReading.from_dict(data["reading"]),
            UtilityScore.from_dict(data["utility"]),
            DriftReading.from_dict(data["drift"]),
        )


@dataclass(frozen=True)
class BeforeJob:
    """Measure a model before any attack, once for all attacks on it."""

    subject: Subject
    measurement: Measurement
    leaves: None = None

    @property
    def path(self) -> str:
        """File of the result."""
        return f"before/{self.subject.slug}/seed-{self.subject.seed}.json"

    def settings(self) -> dict[str, Any]:
        """What the figures depend on."""
        return {**self.subject.settings(), **self.measurement.settings()}

    def run(self) -> Before:
        """Measure."""
        model, tokenizer = self.subject.load()
        reading = read_safety(model, tokenizer, self.measurement, 0)
        utility = measure_utility(model, tokenizer, self.measurement, reading)
        return Before(reading, utility, self.subject.drift(model))

    def read(self, data: dict[str, Any]) -> Before:
        """Build the result."""
        return Before.from_dict(data)


@dataclass(frozen=True)
class CellJob:
    """One model under one attack at one learning rate with one seed.

    Attributes:
        subject: The model.
        attack: The attack.
        rows: SHA-256 of its rows.
        learning_rate: Its highest learning rate.
        readings: How often safety is read.
        measurement: What is measured.
        before: What was measured before.
        weights: Where attacked models are kept; None drops them.
    """

    subject: Subject
    attack: Attack
    rows: str
    learning_rate: float
    readings: int
    measurement: Measurement
    before: Before
    weights: Path | None = None

    @property
    def name(self) -> str:
        """The cell as a path."""
        attack, rate = slug(self.attack.name), f"lr-{self.learning_rate}"
        return f"{attack}/{self.subject.slug}/{rate}/seed-{self.subject.seed}"

    @property
    def path(self) -> str:
        """File of the result."""
        return f"cells/{self.name}.json"

    @property
    def leaves(self) -> Path | None:
        """Where the attacked model is kept."""
        return None if self.weights is None else self.weights / self.name

    def settings(self) -> dict[str, Any]:
        """What the figures depend on."""
        return {
            **self.subject.settings(),
            **self.measurement.settings(),
            # The rows themselves, wherever they lie.
            "attack": {**self.attack.settings(), "data": self.rows, "safe_instruct_data": None},
            "learning_rate": self.learning_rate,
            "readings": self.readings,
        }

    def run(self) -> CellResult:
        """Attack, and measure on the way.

        Returns:
            What came out.

        Raises:
            PromptError: If the rows are no longer those of the plan.
        """
        model, tokenizer = self.subject.load()
        data = load_attack(self.attack)
        if rows_hash(data.train) != self.rows:
            raise PromptError(f"The rows of the attack '{self.attack.name}' were changed while it ran: begin anew.")
        rows = encode_examples(tokenizer, self.attack, data.train)
        steps = planned_steps(len(rows), self.attack.sft)
        task = measure_task(model, tokenizer, self.attack, data.held_out, self.measurement)
        readings = [self.before.reading]

        def read(step: int, attacked: Any) -> None:
            readings.append(read_safety(attacked, tokenizer, self.measurement, step))

        tuned = fine_tune(
            model,
            tokenizer,
            rows,
            sft=self.attack.sft,
            learning_rate=self.learning_rate,
            seed=self.subject.seed,
            lora=self.attack.lora,
            at_steps=reading_steps(steps, self.readings),
            on_step=read,
        )
        result = CellResult(
            model=self.subject.variant.name,
            attack=self.attack.name,
            learning_rate=self.learning_rate,
            seed=self.subject.seed,
            readings=tuple(readings),
            task_before=task,
            task_after=measure_task(tuned.model, tokenizer, self.attack, data.held_out, self.measurement),
            utility_before=self.before.utility,
            utility_after=measure_utility(tuned.model, tokenizer, self.measurement, readings[-1]),
            drift_before=self.before.drift,
            drift_after=self.subject.drift(tuned.model),
            train_loss=tuned.train_loss,
        )
        if self.leaves is not None:
            save_checkpoint(tuned.model, tokenizer, self.leaves)
        return result

    def read(self, data: dict[str, Any]) -> CellResult:
        """Build the result."""
        return CellResult.from_dict(data)


def reading_steps(steps: int, readings: int) -> tuple[int, ...]:
    """Return the steps of an attack after which safety is read: evenly spread, the last one included.

    Args:
        steps: Steps of the attack.
        readings: How many readings; no more than there are steps.

    Returns:
        The steps, ascending.

    Example:
        >>> reading_steps(30, 4)
        (8, 15, 23, 30)
    """
    count = min(steps, readings)
    return tuple(-(-steps * number // count) for number in range(1, count + 1))
