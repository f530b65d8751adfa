"""Everything that can be settled and checked before a model is measured."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from lox_hf.analysis.candidates import make_trials
from lox_hf.analysis.directions import base_of
from lox_hf.analysis.limits import check_limits
from lox_hf.analysis.points import identity
from lox_hf.analysis.select import ATTACK_MOST
from lox_hf.auto.attack import ShortAttack
from lox_hf.auto.base import find_base
from lox_hf.auto.halves import Halves, split_prompts
from lox_hf.auto.report import limits_in_words
from lox_hf.auto.settings import ATTACK, AutoConfig
from lox_hf.config import LoxConfig
from lox_hf.errors import PromptError
from lox_hf.evaluation.data.prompts import Prompt
from lox_hf.evaluation.models.loading import load_model
from lox_hf.hub_files import resolve
from lox_hf.inputs import Pair, open_pair
from lox_hf.plots.style import check_matplotlib
from lox_hf.records import AutoPlan, Choice
from lox_hf.robustness.attacks.recipe import Attack
from lox_hf.robustness.attacks.rows import get_attack
from lox_hf.robustness.checks import check_attack, check_measurement
from lox_hf.robustness.measuring.measure import Measurement, load_all_prompts

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

REFERENCES = 2
"""What `select` attacks in any case: the paper's setting and the full rank."""


@dataclass(frozen=True)
class Prepared:
    """A run that has been checked.

    Attributes:
        config: Its settings.
        base: The base, and where it is named.
        pair: The two models' files.
        halves: Prompts to choose by, and prompts to report on.
        model: The loaded aligned model.
        tokenizer: Its tokenizer.
        candidates: Names of the hardenings that are tried.
    """

    config: AutoConfig
    base: Choice
    pair: Pair
    halves: Halves
    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    candidates: tuple[str, ...]

    def measurement(self, prompts: tuple[Prompt, ...]) -> Measurement:
        """Return how prompts are asked and judged."""
        return _measurement(self.config, prompts)

    @cached_property
    def attacks(self) -> dict[str, ShortAttack]:
        """The short attack by half, whose prompts are asked along it; empty where there is none."""
        if self.config.attack is None:
            return {}
        return {name: self._attack(self.config.attack, half) for name, half in self.halves._asdict().items()}

    def _attack(self, attack: str | Attack, prompts: tuple[Prompt, ...]) -> ShortAttack:
        config = self.config
        changes: dict[str, Any] = {"sft": {**(config.sft or {}), "max_steps": config.attack_steps}}
        if config.lora is not None:
            changes["lora"] = config.lora
        recipe = get_attack(attack, **changes)
        rate, measurement = config.attack_learning_rate, self.measurement(prompts)
        return ShortAttack(recipe, measurement, self.tokenizer, rate, config.seed, config.readings)

    def settings(self) -> dict[str, Any]:
        """Return what the result depends on, as JSON values."""
        config, attack = self.config, self.attacks.get("choosing")
        return {
            "run": "auto",
            "aligned": identity(self.pair.aligned.source),
            "base": identity(base_of(self.pair)),
            "choosing": self.measurement(self.halves.choosing).settings(),
            "reporting": self.measurement(self.halves.reporting).settings(),
            "candidates": list(self.candidates),
            "limits": [limit.to_dict() for limit in config.limits],
            "attack": None if attack is None else attack.settings(),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "allowed_code": config.trust_remote_code,
        }

    def choices(self) -> tuple[Choice, ...]:
        """Return what is settled, with the reason and the option that settles it otherwise."""
        config, harmful = self.config, sum(prompt.harmful for half in self.halves for prompt in half)
        total = sum(map(len, self.halves))
        ranks = ", ".join("full" if r is None else str(r) for r in config.rs)
        first = "" if config.n is None else f", the first {config.n} of each set"
        return (
            Choice("aligned", str(config.aligned_model), "the model to harden"),
            self.base,
            Choice(
                "prompts",
                f"{harmful} harmful, {total - harmful} harmless of {', '.join(map(str, config.prompts))}",
                f"{len(self.halves.choosing)} to choose by, the others to report on{first}; --prompts, --n",
            ),
            Choice("utility", self._utility(), "--utility, --utility-data"),
            Choice(
                "tried",
                f"{len(self.candidates)} hardenings: r {ranks}; alpha {', '.join(f'{a:g}' for a in config.alphas)}; "
                f"weights {', '.join(config.targets)}",
                "--rs, --alphas, --targets",
            ),
            Choice("limits", limits_in_words(config.limits), "what it may cost against the aligned model; --limits"),
            self._attack_choice(),
        )

    def plan(self) -> AutoPlan:
        """Return what the run would do at most."""
        attack, candidates = self.attacks.get("choosing"), len(self.candidates)
        attacked = 0 if attack is None else 3 + min(candidates, ATTACK_MOST + REFERENCES)
        return AutoPlan(
            choices=self.choices(),
            candidates=candidates,
            measured=4 + candidates,
            attacked=attacked,
            attack_steps=0 if attack is None else attack.steps(),
            prompts=len(self.halves.choosing),
        )

    def is_changed(self) -> bool:
        """Say whether alignment has changed any weight at all."""
        ours, theirs = self.pair.aligned.source, base_of(self.pair)
        known = theirs.infos()
        for name in ours.infos():
            differs = name not in known or not torch.equal(ours.get(name), theirs.get(name))
            ours.release(name)
            if name in known:
                theirs.release(name)
            if differs:
                return True
        return False

    def _utility(self) -> str:
        names = ["divergence from the aligned model on harmless prompts"] if self.has_harmless else []
        measure = self.measurement(self.halves.choosing).utility_measure
        return " and ".join([*names, *[measure] * (measure != "none")]) or "not measured: no prompt is harmless"

    @property
    def has_harmless(self) -> bool:
        """Whether both halves have harmless prompts."""
        return all(any(not prompt.harmful for prompt in half) for half in self.halves)

    def _attack_choice(self) -> Choice:
        attack = self.attacks.get("choosing")
        if attack is None:
            return Choice("attack", "none", "--no-attack: robustness is not measured; the strongest edit is taken")
        rate = attack.recipe.sft.get("learning_rate") if attack.learning_rate is None else attack.learning_rate
        default = "ordinary fine-tuning, which is known to cost safety; " * (self.config.attack == ATTACK)
        return Choice(
            "attack",
            f"{attack.recipe.name}: {len(attack.data.train)} rows, {attack.steps()} steps, learning rate {rate:g}",
            f"{default}--attack, --attack-steps, --attack-lr, --no-attack",
        )


def prepare(config: AutoConfig) -> Prepared:
    """Find everything that a run needs, and check that it fits together.

    Args:
        config: The settings.

    Returns:
        The checked run, with the aligned model loaded.

    Raises:
        ConfigError: If settings contradict each other, no base is named, or a package is missing.
        PromptError: If prompts or rows cannot be read.
        PairingError: If the two models do not fit.
        CheckpointError: If files are missing or damaged.
        UnsupportedModelError: If weights cannot be edited or trained.
        AlreadyHardenedError: If the aligned model is hardened already.

    Example:
        >>> prepared = prepare(AutoConfig("org/aligned"))  # doctest: +SKIP
        >>> prepared.base.value  # doctest: +SKIP
        'org/base'
    """
    check_limits(config.limits)
    check_matplotlib()
    aligned = str(config.aligned_model)
    files = resolve(aligned, revision=config.revision)
    base = find_base(files, None if config.base_model is None else str(config.base_model))
    shared = LoxConfig(base.value, r=1, revision=config.base_revision)
    pair = open_pair(aligned, None, shared, revision=config.revision, trust_remote_code=config.trust_remote_code)
    halves = split_prompts(load_all_prompts(config.prompts, config.n))
    model, tokenizer = load_model(
        aligned,
        revision=config.revision,
        dtype=config.dtype,
        device=config.device,
        trust_remote_code=config.trust_remote_code,
    )
    trials = make_trials(model, pair.aligned.source.infos(), config.rs, config.alphas, config.targets)
    prepared = Prepared(config, base, pair, halves, model, tokenizer, tuple(trial.name for trial in trials))
    check_measurement(model, tokenizer, prepared.measurement(halves.choosing), here=True)
    _check_attack(prepared)
    return prepared


def _measurement(config: AutoConfig, prompts: tuple[Prompt, ...]) -> Measurement:
    names = ("judge", "template", "max_new_tokens", "batch_size", "system_prompt", "utility", "utility_n")
    data = None if config.utility_data is None else str(config.utility_data)
    return Measurement(prompts, **{name: getattr(config, name) for name in names}, utility_data=data)


def _check_attack(prepared: Prepared) -> None:
    attack = prepared.attacks.get("choosing")
    if attack is None:
        return
    try:
        data = attack.data
    except PromptError as error:
        raise PromptError(
            f"{error} To attack with rows of your own pass --attack custom:FILE, or --no-attack."
        ) from error
    attack.steps()
    # Adapters that are tried on leave a model without gradients.
    gradients: Mapping[str, bool] = {name: w.requires_grad for name, w in prepared.model.named_parameters()}
    check_attack(prepared.model, prepared.tokenizer, attack.recipe, replace(data, held_out=[]))
    for name, weight in prepared.model.named_parameters():
        weight.requires_grad_(gradients[name])
