"""What a fine-tuning under watch needs: models, directions, rows, and prompts for the probe and for the test."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lox_hf import LoxConfig, Prompt, SafetyProbe, SafetySubspace
from lox_hf.demo import trained_pair
from lox_hf.demo.attacks import ATTACKS, calibration_rows, safety_rows, write_attacks
from lox_hf.demo.measure import BATCH_SIZE, LONGEST_ANSWER
from lox_hf.demo.training import Recipe
from lox_hf.demo.world import REFUSAL, held_out_prompts
from lox_hf.evaluation.data.prompts import load_prompts
from lox_hf.robustness.attacks.recipe import Attack
from lox_hf.robustness.attacks.rows import AttackData, get_attack, load_attack
from lox_hf.robustness.measuring.measure import Measurement
from lox_hf.training.probe import REFUSAL as ENGLISH_REFUSAL

# Twice the demonstration's own: all refusals are lost within its 30 steps, and not within the first few.
LEARNING_RATES = {"pairs-100": 2e-4, "benign": 6e-4}
PROBED = 24
# Of the test's prompts of a real model, at most so many harmful ones and as many harmless ones.
TESTED = 100
ROWS_NAME = "attack-rows"


@dataclass(frozen=True)
class Inputs:
    """Everything that runs of one model share.

    Attributes:
        aligned: The model that is fine-tuned: folder or Hub id.
        base: The model before alignment; None where it is not at hand, and then R_ft is not read.
        subspace: Directions between the two.
        attack: The fine-tuning.
        data: Its rows.
        probed: Prompts that the model is asked while it trains; none of them is in the test.
        refusal: The answer whose perplexity the probe reads.
        measurement: The test at the end.
    """

    aligned: str
    base: str | None
    subspace: SafetySubspace
    attack: Attack
    data: AttackData
    probed: Sequence[Prompt]
    refusal: str
    measurement: Measurement

    def probe(self) -> SafetyProbe:
        """Return a new probe."""
        return SafetyProbe(self.probed, max_new_tokens=self.measurement.max_new_tokens, refusal=self.refusal)


def small_inputs(
    pairs: Path,
    rows: Path,
    name: str,
    seed: int,
    recipe: Recipe | None = None,
    *,
    sft: Mapping[str, Any] = MappingProxyType({}),
    lora: Mapping[str, Any] | None = None,
) -> Inputs:
    """Return the demonstration's invented world as inputs.

    Args:
        pairs: Folder of trained pairs; one that is missing is trained there, which takes most of a minute.
        rows: Folder for the rows of the fine-tunings.
        name: Which of `lox_hf.demo.attacks.ATTACKS`.
        seed: Seed of the pair.
        recipe: How a missing pair is trained; None takes the demonstration's.
        sft: Settings of SFTConfig in place of the fine-tuning's own.
        lora: Settings of LoraConfig; None trains all weights.
    """
    base, aligned = trained_pair(seed, pairs, recipe)
    if not rows.exists():
        write_attacks(rows)
    found = next(attack for attack in ATTACKS if attack.name == name)
    attack = get_attack(
        f"custom:{rows / found.file_name}",
        name=name,
        sft={**found.sft, "learning_rate": LEARNING_RATES[name], **sft},
        lora=lora,
        task="exact" if found.held_out else "loss",
        held_out=found.held_out,
    )
    # Of questions that neither the fine-tunings nor the test contain; every other calibration row is of new things.
    harmful = [Prompt(row.question, harmful=True) for row in safety_rows(0)[:PROBED]]
    harmless = [Prompt(row.question, harmful=False) for row in calibration_rows(0)[1 : 2 * PROBED : 2]]
    return Inputs(
        aligned=str(aligned),
        base=str(base),
        subspace=find_directions(str(aligned), str(base), 2, lora),
        attack=attack,
        data=load_attack(attack),
        probed=harmful + harmless,
        refusal=REFUSAL,
        measurement=Measurement(tuple(held_out_prompts()), max_new_tokens=LONGEST_ANSWER, batch_size=BATCH_SIZE),
    )


def real_inputs(options: argparse.Namespace, *, sft: Mapping[str, Any], lora: Mapping[str, Any] | None) -> Inputs:
    """Return a model of the user's as inputs.

    Args:
        options: Command line.
        sft: Settings of SFTConfig in place of the data set's own.
        lora: Settings of LoraConfig; None trains all weights.
    """
    subspace = (
        SafetySubspace.from_pretrained(options.subspace)
        if options.subspace
        else find_directions(options.aligned_model, options.base_model, options.r, lora)
    )
    attack = get_attack(options.dataset, sft=sft, lora=lora)
    probed, tested = split_prompts([load_prompts(name) for name in options.prompts], options.n)
    return Inputs(
        aligned=options.aligned_model,
        base=options.base_model,
        subspace=subspace,
        attack=attack,
        data=load_attack(attack),
        probed=probed,
        refusal=ENGLISH_REFUSAL,
        measurement=Measurement(tuple(tested)),
    )


def find_directions(aligned: str, base: str, r: int, lora: Mapping[str, Any] | None) -> SafetySubspace:
    """Find the directions; under LoRA those of linear layers only, as an embedding can take no correction there."""
    config = LoxConfig(r=r, target_modules=None if lora is None else "all-linear")
    return SafetySubspace.from_models(aligned, base, config, progressbar=False)


def split_prompts(sets: Sequence[Sequence[Prompt]], most: int = TESTED) -> tuple[list[Prompt], list[Prompt]]:
    """Split prompts into those for the probe and those for the test, harmful and harmless ones alike.

    Args:
        sets: Prompts of every set.
        most: At most so many of a kind are tested.

    Returns:
        At most `PROBED` of a kind, and never more than half of them; and the test's.
    """
    probed, tested = [], []
    for harmful in (True, False):
        kind = [prompt for prompts in sets for prompt in prompts if prompt.harmful == harmful]
        cut = min(PROBED, len(kind) // 2)
        probed += kind[:cut]
        tested += kind[cut : cut + most]
    return probed, tested
