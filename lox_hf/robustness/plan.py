"""`plan_stress`: what a stress test would do, how long it would take and how much memory it needs."""

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lox_hf.records import AttackPlan, StressPlan
from lox_hf.robustness.attacks.rows import encode_examples
from lox_hf.robustness.cells import reading_steps
from lox_hf.robustness.finetuning.finetune import fine_tune, planned_steps
from lox_hf.robustness.matrix import Matrix, PlannedAttack, open_matrix
from lox_hf.robustness.measuring.measure import read_safety
from lox_hf.robustness.settings import StressConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TRIAL_STEPS, TRIAL_PROMPTS = 3, 64
STATES = 4
"""What AdamW holds of a weight that is trained: itself, its gradient, and two moments."""


def plan_stress(config: StressConfig, *, estimate: bool = True) -> StressPlan:
    """Check everything that a stress test needs, and say what it would do; nothing is written.

    Args:
        config: The matrix.
        estimate: Load the aligned model of the first seed, and take a few steps of each attack and a few answers of
            it, for the time that all would take.

    Returns:
        The plan.

    Raises:
        LoxError: As `stress_test` would.

    Example:
        >>> config = StressConfig("org/aligned", "org/base", ["gsm8k", "dolly"])  # doctest: +SKIP
        >>> plan = plan_stress(config)  # doctest: +SKIP
        >>> f"{plan.cells} runs, {plan.seconds / 3600:.1f} h"  # doctest: +SKIP
        '54 runs, 31.5 h'
    """
    matrix = open_matrix(config, Path("work"))
    subject = matrix.subjects[config.seeds[0]][0]
    model, tokenizer = subject.load()
    attacks = tuple(_attack_plan(matrix, planned) for planned in matrix.attacks)
    # Adapters and what is held of them are small beside the weights.
    states = 1 if all(planned.attack.lora for planned in matrix.attacks) else STATES
    harmful = sum(prompt.harmful for prompt in matrix.measurement.prompts)
    plan = StressPlan(
        models=tuple(one.variant.name for one in matrix.subjects[config.seeds[0]]),
        attacks=attacks,
        seeds=tuple(config.seeds),
        scanning_seeds=config.scanning_seeds,
        harmful=harmful,
        harmless=len(matrix.measurement.prompts) - harmful,
        cells=sum(_cells_of(matrix, attack) for attack in attacks),
        memory_bytes=states * sum(weight.nbytes for weight in model.parameters()),
        not_run=matrix.not_run,
    )
    return replace(plan, seconds=_seconds(matrix, plan, model, tokenizer)) if estimate else plan


def _attack_plan(matrix: Matrix, planned: PlannedAttack) -> AttackPlan:
    rows = len(planned.data.train)
    steps = planned_steps(rows, planned.attack.sft)
    return AttackPlan(
        name=planned.attack.name,
        rows=rows,
        held_out=len(planned.data.held_out),
        steps=steps,
        readings=reading_steps(steps, matrix.config.readings),
        learning_rates=planned.learning_rates,
        source=planned.attack.source,
    )


def _cells_of(matrix: Matrix, attack: AttackPlan) -> int:
    config = matrix.config
    scanning = len(config.scanning_seeds)
    models = len(matrix.subjects[config.seeds[0]])
    return models * (scanning * len(attack.learning_rates) + len(config.seeds) - scanning)


def _seconds(
    matrix: Matrix, plan: StressPlan, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase"
) -> float:
    """Time of all cells, from a few steps and answers; utility and the attack's own task are not in it."""
    measurement = matrix.measurement
    few = replace(measurement, prompts=measurement.prompts[:TRIAL_PROMPTS])
    read_safety(model, tokenizer, few, 0)  # the first one is the slowest
    started = time.perf_counter()
    read_safety(model, tokenizer, few, 0)
    reading = (time.perf_counter() - started) * len(measurement.prompts) / len(few.prompts)
    total = 0.0
    for planned, attack in zip(matrix.attacks, plan.attacks, strict=True):
        rows = encode_examples(tokenizer, planned.attack, planned.data.train)
        taken = []
        for steps in (1, 1 + TRIAL_STEPS):  # the first step is the slowest
            started = time.perf_counter()
            trial = {**planned.attack.sft, "max_steps": steps}
            fine_tune(model, tokenizer, rows, sft=trial, seed=0, lora=planned.attack.lora)
            taken.append(time.perf_counter() - started)
        step = max(0.0, taken[1] - taken[0]) / TRIAL_STEPS
        total += _cells_of(matrix, attack) * (step * attack.steps + reading * len(attack.readings))
    return total / (matrix.config.workers or 1)
