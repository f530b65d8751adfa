"""`StressConfig`: which models meet which attacks, and what is measured of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from lox_hf.config import LoxConfig
from lox_hf.errors import ConfigError
from lox_hf.robustness.attacks.rows import Attack
from lox_hf.robustness.controls import ControlTraining

SEED = "{seed}"


@dataclass(frozen=True)
class StressConfig:
    """Settings of a stress test: every model of the matrix meets every attack at several learning rates and seeds.

    The models are the aligned one, one hardened model for each `LoxConfig`, and controls. A gain that a control has as
    well is no gain of LoX: "random" is an edit of the same norm along random directions, "expo" the full rank,
    "rescaled" the same function in weights that fine-tuning moves less, "safeinst" the aligned model with safety
    examples mixed into the attack, "refusal-matched" the aligned model trained on until it refuses as many harmless
    prompts as the hardened one, "retrained" the aligned model trained a little longer on harmless prompts.

    Args:
        aligned_model: The aligned model: folder or Hub id. "{seed}" in it stands for the seed, where every seed has
            its own pair.
        base_model: The model before alignment, in the same form.
        attacks: Attacks by name ("gsm8k", "alpaca", "dolly", "identity-shift"), "NAME:FILE" for data of one's own in a
            preset's format, "custom:FILE" for any prompts and responses, or `Attack`s.
        hardened: Settings of the hardened models; `base_model_name_or_path` in them is not used.
        controls: Names of controls; None takes all that can be made of what is given.
        learning_rates: What every model meets; it is judged at its own worst one. None takes once, twice and four
            times the attack's own.
        seeds: Seeds of the order of the rows, of the random control, and of the pair where each has its own.
        scan_seeds: How many of the seeds meet all learning rates; the others meet the one that was worst on those.
            None takes all seeds.
        readings: How often safety is read along an attack, the end included.
        prompts: Prompt sets by name or file, one after the other; those labelled as harmless measure over-refusal.
        n: The first n prompts of each set only; None takes all.
        judge: Judge of the answers, as `evaluate_safety` takes it; with `workers` by name.
        template: Prompt format of the questions: "auto", "chat", "alpaca" or "none".
        max_new_tokens: Longest answer in tokens.
        batch_size: Prompts at once; None finds what fits.
        system_prompt: A system turn before every prompt; None sends none.
        utility: What a model is good for: "known answers" (of harmless prompts), "gsm8k", "perplexity", "none"; "auto"
            takes known answers where there are some, else the perplexity of `utility_data`, else none.
        utility_data: File of questions for "gsm8k", of texts for "perplexity".
        utility_n: The first n of these only; None takes all.
        safety_data: Prompts with refusals, a file or Hub data set: for safeinst and refusal-matched.
        calibration_data: Harmless prompts with answers that are in no prompt set: for refusal-matched and retrained.
        control_training: How refusal-matched and retrained are trained.
        sft: Settings of TRL's SFTConfig that take the place of those of every attack.
        lora: Settings of PEFT's LoraConfig for attacks by LoRA; None attacks all weights.
        revision: Revision of the aligned model on the Hub.
        base_revision: Revision of the base on the Hub.
        dtype: Dtype to load in; "auto" keeps the checkpoint's.
        device: Where models go; None takes the accelerator if there is one, else the CPU.
        trust_remote_code: Run code of the models' repositories.
        keep_weights: Keep every attacked model, in `weights/`; they are dropped otherwise.
        workers: Processes that work side by side, each on one thread; None works here.

    Raises:
        ConfigError: If settings are out of range; all of them are listed.

    Example:
        >>> from lox_hf import LoxConfig, StressConfig
        >>> config = StressConfig(
        ...     "org/aligned", "org/base", ["gsm8k", "dolly"], hardened=[LoxConfig(r=6, alpha=1.25)], seeds=(0, 1, 2)
        ... )
        >>> config.pair(1)
        ('org/aligned', 'org/base')

    Source: Perin et al., COLM 2025, section 4; the controls are this package's own.
    """

    aligned_model: str | Path
    base_model: str | Path
    attacks: Sequence[str | Attack]
    hardened: Sequence[LoxConfig] = (LoxConfig(),)
    controls: Sequence[str] | None = None
    learning_rates: Sequence[float] | None = None
    seeds: Sequence[int] = (0, 1, 2)
    scan_seeds: int | None = None
    readings: int = 10
    prompts: Sequence[str | Path] = ("advbench", "xstest")
    n: int | None = None
    judge: Any = "refusal"
    template: str = "auto"
    max_new_tokens: int = 60
    batch_size: int | None = None
    system_prompt: str | None = None
    utility: str = "auto"
    utility_data: str | Path | None = None
    utility_n: int | None = None
    safety_data: str | Path | None = None
    calibration_data: str | Path | None = None
    control_training: ControlTraining = field(default_factory=ControlTraining)
    sft: Mapping[str, Any] = field(default_factory=dict)
    lora: Mapping[str, Any] | None = None
    revision: str | None = None
    base_revision: str | None = None
    dtype: str = "auto"
    device: str | None = None
    trust_remote_code: bool = False
    keep_weights: bool = False
    workers: int | None = None

    def __post_init__(self) -> None:
        problems = [*self._number_problems(), *self._list_problems()]
        if problems:
            raise ConfigError("Invalid stress test: " + "; ".join(problems) + ".")

    def pair(self, seed: int) -> tuple[str, str]:
        """Return the aligned and the base model of a seed."""
        return tuple(str(name).replace(SEED, str(seed)) for name in (self.aligned_model, self.base_model))  # type: ignore

    @property
    def scanning_seeds(self) -> tuple[int, ...]:
        """The seeds that meet all learning rates."""
        return tuple(self.seeds)[: self.scan_seeds]

    def _number_problems(self) -> list[str]:
        problems = []
        names = ("readings", "max_new_tokens", "scan_seeds", "n", "batch_size", "utility_n", "workers")
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name in names and value is not None and (not isinstance(value, int) or value < 1):
                problems.append(f"{item.name} must be a positive whole number, got {value!r}")
        if any(not isinstance(rate, (int, float)) or not 0 < rate < 1 for rate in self.learning_rates or ()):
            problems.append(f"learning_rates must lie between 0 and 1, got {list(self.learning_rates or ())}")
        if any(not isinstance(seed, int) or seed < 0 for seed in self.seeds):
            problems.append(f"seeds must be whole numbers from 0, got {list(self.seeds)}")
        return problems

    def _list_problems(self) -> list[str]:
        problems = []
        for name in ("attacks", "hardened", "seeds", "prompts"):
            value = getattr(self, name)
            if isinstance(value, str) or not len(value):
                problems.append(f"{name} must be a list with something in it, got {value!r}")
            elif len({repr(item) for item in value}) < len(value):
                problems.append(f"{name} names something twice")
        if self.workers is not None and not isinstance(self.judge, str):
            problems.append("judge must be a name where workers are used: other processes cannot be sent a function")
        if self.learning_rates is not None and (
            not len(self.learning_rates) or len(set(self.learning_rates)) < len(self.learning_rates)
        ):
            problems.append(f"learning_rates must be different numbers, got {list(self.learning_rates)}")
        if any(SEED in str(name) for name in (self.aligned_model, self.base_model)) and not all(
            SEED in str(name) for name in (self.aligned_model, self.base_model)
        ):
            problems.append(f"{SEED} must stand in both models or in neither")
        return problems
