"""`AutoConfig`: what the whole way by one command can be told; every default is meant to do."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from lox_hf.analysis.limits import DEFAULT_LIMITS
from lox_hf.analysis.select import ALPHAS, RS
from lox_hf.errors import ConfigError
from lox_hf.records import Limit
from lox_hf.robustness.attacks.recipe import Attack

TARGETS = ("all", "attention")
ATTACK = "gsm8k"
ATTACK_STEPS = 50
PROMPTS = ("advbench", "xstest")
N = 200
READINGS = 5


@dataclass(frozen=True)
class AutoConfig:
    """Settings of `auto_harden`.

    Args:
        aligned_model: The aligned model: folder or Hub id.
        base_model: The model before alignment; None takes what the aligned model's own files name.
        prompts: Prompt sets by name or file; those labelled as harmless measure over-refusal and the divergence.
        n: The first n prompts of each set; half of them is chosen by, half is reported on. None takes all.
        judge: Judge of the answers, as `evaluate_safety` takes it.
        template: Prompt format: "auto", "chat", "alpaca" or "none".
        max_new_tokens: Longest answer in tokens.
        batch_size: Prompts at once; None finds what fits.
        system_prompt: A system turn before every prompt; None sends none.
        utility: What a model is good for, besides the divergence: "known answers" (of harmless prompts), "gsm8k",
            "perplexity" or "none"; "auto" takes known answers where there are some, else the perplexity of
            `utility_data`, else none.
        utility_data: File of questions for "gsm8k", of texts for "perplexity".
        utility_n: The first n of these only; None takes all.
        rs: Ranks to try, as `LoxConfig.r` takes them.
        alphas: Strengths to try.
        targets: Which weights to try, as `lox_hf.analysis.candidates.make_trials` takes them.
        limits: What a hardening may cost, as `select` takes it.
        attack: The short fine-tuning after which safety is compared: a name ("gsm8k", "alpaca", "dolly"),
            "NAME:FILE", "custom:FILE" for any prompts and responses, or an `Attack`; None compares without one.
        attack_steps: Optimiser steps of the attack.
        attack_learning_rate: Its highest learning rate; None takes the attack's own.
        sft: Settings of TRL's SFTConfig in place of the attack's own.
        lora: Settings of PEFT's LoraConfig, for an attack by LoRA; None trains all weights.
        readings: How often safety is read along the attack.
        seed: Seed of the attack.
        revision: Revision of the aligned model on the Hub.
        base_revision: Revision of the base on the Hub.
        dtype: Dtype to load in; "auto" keeps the checkpoint's.
        device: Where the model goes; None takes the accelerator if there is one, else the CPU.
        trust_remote_code: Run code of the aligned model's repository.

    Raises:
        ConfigError: If settings are out of range; all of them are listed.

    Example:
        >>> AutoConfig("org/aligned").attack
        'gsm8k'
    """

    aligned_model: str | Path
    base_model: str | Path | None = None
    prompts: Sequence[str | Path] = PROMPTS
    n: int | None = N
    judge: Any = "refusal"
    template: str = "auto"
    max_new_tokens: int = 60
    batch_size: int | None = None
    system_prompt: str | None = None
    utility: str = "auto"
    utility_data: str | Path | None = None
    utility_n: int | None = None
    rs: Sequence[int | float | None] = RS
    alphas: Sequence[float] = ALPHAS
    targets: Sequence[str] = TARGETS
    limits: Sequence[Limit] = DEFAULT_LIMITS
    attack: str | Attack | None = ATTACK
    attack_steps: int = ATTACK_STEPS
    attack_learning_rate: float | None = None
    sft: Mapping[str, Any] | None = None
    lora: Mapping[str, Any] | None = None
    readings: int = READINGS
    seed: int = 0
    revision: str | None = None
    base_revision: str | None = None
    dtype: str = "auto"
    device: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        problems = [*self._number_problems(), *self._list_problems()]
        if problems:
            raise ConfigError(f"Invalid settings: {'; '.join(problems)}.")

    def _number_problems(self) -> list[str]:
        names = ("n", "max_new_tokens", "batch_size", "utility_n", "attack_steps", "readings")
        given = {item.name: getattr(self, item.name) for item in fields(self)}
        problems = [
            f"{name} must be a positive whole number, got {given[name]!r}"
            for name in names
            if given[name] is not None and (not isinstance(given[name], int) or given[name] < 1)
        ]
        rate = self.attack_learning_rate
        if rate is not None and (not isinstance(rate, (int, float)) or not 0 < rate < 1):
            problems.append(f"attack_learning_rate must lie between 0 and 1, got {rate!r}")
        if not isinstance(self.seed, int) or self.seed < 0:
            problems.append(f"seed must be a whole number from 0, got {self.seed!r}")
        return problems

    def _list_problems(self) -> list[str]:
        return [
            f"{name} must be a list with something in it, got {value!r}"
            for name in ("prompts", "rs", "alphas", "targets")
            if isinstance(value := getattr(self, name), str) or not len(value)
        ]
