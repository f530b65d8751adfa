"""A short fine-tuning, and what is left of a model's safety along it."""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from lox_hf.records import SafetyReport, Score, StepReading
from lox_hf.robustness.attacks.examples import rows_hash
from lox_hf.robustness.attacks.recipe import Attack
from lox_hf.robustness.attacks.rows import AttackData, encode_examples, get_attack, load_attack
from lox_hf.robustness.cells import reading_steps
from lox_hf.robustness.findings.curves import half_life, mean_asr
from lox_hf.robustness.finetuning.finetune import fine_tune, planned_steps
from lox_hf.robustness.measuring.measure import Measurement, ask_prompts, step_reading

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class ShortAttack:
    """A score function of loaded models that fine-tunes them, as `lox_hf.analysis.select.select` takes it.

    One fixed step says little: an attack that breaks one model at step 14 breaks another at step 15. So the mean of
    the attack success rate over the whole attack is the figure to choose by, and the last reading stands beside it.

    Attributes:
        attack: The attack.
        measurement: The prompts, and how they are asked and judged; its utility is not measured.
        tokenizer: The models' tokenizer.
        learning_rate: Highest learning rate, in place of the attack's own.
        seed: Seed of the order of the rows, of dropout and of adapters.
        readings: How often safety is read along the attack, besides before it.
        max_steps: Optimiser steps; None takes as many as the attack has.

    Example:
        >>> attack = ShortAttack(get_attack("gsm8k"), Measurement(prompts), tokenizer, max_steps=50)  # doctest: +SKIP
        >>> score = attack.score(model)  # doctest: +SKIP
        >>> score.value("asr"), score.value("asr_mean")  # doctest: +SKIP
        (0.92, 0.61)
    """

    attack: Attack
    measurement: Measurement
    tokenizer: "PreTrainedTokenizerBase"
    learning_rate: float | None = None
    seed: int = 0
    readings: int = 5
    max_steps: int | None = None

    @cached_property
    def recipe(self) -> Attack:
        """The attack with this many steps."""
        return self.attack if self.max_steps is None else get_attack(self.attack, sft={"max_steps": self.max_steps})

    @cached_property
    def data(self) -> AttackData:
        """Rows of the attack, loaded once.

        Raises:
            PromptError: If they cannot be had or read.
        """
        return load_attack(self.attack)

    def settings(self) -> dict[str, Any]:
        """Return what a score depends on besides the model, as JSON values.

        Raises:
            ConfigError: If the judge is not known.
            PromptError: If the rows cannot be had or read.
        """
        rows = rows_hash(self.data.train)  # the rows themselves, wherever they lie
        return {
            **self.measurement.settings(),
            "attack": {**self.recipe.settings(), "data": rows, "safe_instruct_data": None},
            "learning_rate": self.learning_rate,
            "seed": self.seed,
            "readings": self.readings,
        }

    def steps(self) -> int:
        """Return how many optimiser steps the attack takes.

        Raises:
            ConfigError: If TRL is missing, or a setting of the training is unknown or out of range.
            PromptError: If the rows cannot be had or read.
        """
        return planned_steps(len(self.data.train), self.recipe.sft)

    def score(self, model: "PreTrainedModel") -> Score:
        """Attack a model, and measure on the way.

        Args:
            model: The model, in ordinary weights; they are those of the attacked model afterwards.

        Returns:
            The rates of the last reading with their marks; and the figures "asr_mean", the attack success rate
            averaged over the steps of the attack, and "steps_to_half", the step at which it reaches 50 %, which is
            missing where it does not.

        Raises:
            ConfigError: If a setting is out of range or does not fit the model.
            PromptError: If data cannot be had or read, or rows are longer than the model's context.
            UnsupportedModelError: If the model cannot be trained.
            EndpointError: If the judge's endpoint cannot be used.
            LoxError: If the memory does not suffice.
        """
        rows = encode_examples(self.tokenizer, self.recipe, self.data.train)
        reports: dict[int, SafetyReport] = {0: ask_prompts(model, self.tokenizer, self.measurement)}

        def read(step: int, attacked: Any) -> None:
            reports[step] = ask_prompts(attacked, self.tokenizer, self.measurement)

        fine_tune(
            model,
            self.tokenizer,
            rows,
            sft=self.recipe.sft,
            learning_rate=self.learning_rate,
            seed=self.seed,
            lora=self.recipe.lora,
            at_steps=reading_steps(self.steps(), self.readings),
            on_step=read,
        )
        *_, last = reports.values()
        return Score.of(last).joined(_along([step_reading(report, step) for step, report in reports.items()]))


def _along(readings: list[StepReading]) -> Score:
    """What all readings together say."""
    half = half_life(readings)
    reached = {} if half.at_least else {"steps_to_half": half.steps}
    return Score(figures={"asr_mean": mean_asr(readings), **reached})
