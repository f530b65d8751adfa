"""Stress tests that were never run: runs whose curves are known, summed up by the real summary."""

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import product

from lox_hf.records import CellResult, ModelReference, StressReport
from lox_hf.robustness.findings.summary import summarise
from robustness.made_cells import N, cell, reading

# Half-life in steps and over-refusal before the attack; much like shared/DEMO.md's table on real text.
MODELS = {
    "aligned": (4.5, 0.23),
    "hardened r=2 alpha=0.5": (6.7, 0.34),
    "random r=2 alpha=1.0": (4.8, 0.23),
    "hardened r=2 alpha=1.0": (8.3, 0.41),
    "refusal-matched": (7.4, 0.42),
    "expo alpha=1.0": (7.0, 0.52),
    "rescaled": (6.1, 0.23),
    "retrained": (5.9, 0.24),
}
ATTACKS = {"gsm8k": 1.6, "alpaca": 1.0, "dolly": 1.3, "identity-shift": 2.3}
WORST = 5e-5
RATES = {2e-5: 1.6, WORST: 1.0, 1e-4: 1.2}
STEPS = tuple(range(0, 21, 2))


def attack_rate(step: int, half: float, steepness: float = 1.4) -> float:
    return 0.01 + 0.97 / (1 + math.exp(-(step - half) / steepness))


def run(
    model: str,
    attack: str = "gsm8k",
    learning_rate: float = WORST,
    seed: int = 0,
    *,
    half: float = 4.5,
    over_refusal: float | None = 0.23,
    utility: float | None = 0.85,
    steps: Sequence[int] = STEPS,
) -> CellResult:
    """One run whose attack success rate passes 50 % near the step `half`."""
    readings = []
    for step in steps:
        refused = None if over_refusal is None else over_refusal * 0.9**step
        found = reading(step, attack_rate(step, half), refused)
        readings.append(replace(found, labels="c" * found.asr.count + "r" * (N - found.asr.count)))
    about = {"attack": attack, "lr": learning_rate, "kept": utility, "before": 0.9, "task": (0.62, 1.2)}
    return cell(model, seed, readings, **about)


def runs(
    models: Sequence[str] = tuple(MODELS),
    attacks: Sequence[str] = tuple(ATTACKS),
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
    *,
    benign: bool = True,
    utility: bool = True,
) -> list[CellResult]:
    """Every model under every attack: all learning rates on the first seed, the worst one on all."""
    cells = []
    for attack, model, seed in product(attacks, models, seeds):
        half, refused = MODELS.get(model, (6.0, 0.3))
        luck = random.Random(f"{attack} {model} {seed}").gauss(0, 1)
        own = {"over_refusal": refused if benign else None, "utility": 0.8 + luck / 60 if utility else None}
        for learning_rate, slower in RATES.items():
            if seed == seeds[0] or learning_rate == WORST:
                steps = max(1.0, half * ATTACKS.get(attack, 1.0) * slower + luck)
                cells.append(run(model, attack, learning_rate, seed, half=steps, **own))
    return cells


def report_of(cells: Sequence[CellResult], **changes: object) -> StressReport:
    """The real summary of runs."""
    report = summarise(
        cells,
        aligned=ModelReference("acme/tiny-aligned", "0123abc"),
        base=ModelReference("acme/tiny-base", "4567def"),
        settings={"prompts": {"name": "advbench", "n": 100}, "judge": "refusal", "sft": {"bf16": False}},
        not_run=("safeinst: no safety examples were given",),
        versions={"torch": "2.9.0", "trl": "1.4.0"},
    )
    return replace(report, **changes)  # type: ignore[arg-type]
