"""The matrix of a stress test, opened: every model, attack and prompt is found and checked before any training."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lox_hf.errors import CheckpointError, ConfigError, UnsupportedModelError
from lox_hf.evaluation.models.loading import load_model
from lox_hf.harden import plan_hardening
from lox_hf.hub_files import BASE_FILES, Resolved, resolve
from lox_hf.records import ModelReference
from lox_hf.robustness.attacks.examples import Example, load_examples, rows_hash
from lox_hf.robustness.attacks.rows import Attack, AttackData, get_attack, load_attack
from lox_hf.robustness.checks import (
    check_attack,
    check_control,
    check_measurement,
    check_packages,
    why_not_rescaled,
)
from lox_hf.robustness.controls import split_benign
from lox_hf.robustness.finetuning.finetune import planned_steps
from lox_hf.robustness.measuring.measure import Measurement, load_all_prompts
from lox_hf.robustness.settings import SEED, StressConfig
from lox_hf.robustness.subject import Subject, fingerprint, slug
from lox_hf.robustness.variants import CONTROLS, TRAINED, Variant, make_variants
from lox_hf.weights.folder import is_adapter

LR_FACTORS = (1.0, 2.0, 4.0)
"""What an attack's own learning rate is multiplied by where none is named: upwards, as what only slows an attack down
(the control "rescaled" by 4) is found out by a higher one."""
SAFE_SHARE = 0.025
"""Safety examples in an attack's rows, as the paper's SafeInst baseline has them."""
NEEDS = {
    "safeinst": ("safety_data",),
    "refusal-matched": ("safety_data", "calibration_data"),
    "retrained": ("calibration_data",),
}
"""Controls that need data."""


@dataclass(frozen=True)
class PlannedAttack:
    """One attack with its rows.

    Attributes:
        attack: The recipe.
        data: Its rows.
        rows: SHA-256 of them.
        learning_rates: What every model meets.
    """

    attack: Attack
    data: AttackData
    rows: str
    learning_rates: tuple[float, ...]


@dataclass(frozen=True)
class Matrix:
    """Everything that a stress test consists of.

    Attributes:
        config: What was asked for.
        subjects: The models of each seed, in the order of the report.
        attacks: The attacks.
        measurement: What is measured.
        safe_attacks: The attacks again with safety examples mixed in, for "safeinst".
        control_rows: SHA-256 of the rows that a kind of control is trained on.
        not_run: What belongs to a full test and is not run, each with its reason.
        aligned: The aligned model, for the report.
        base: The model before alignment.
        work: Folder of what is made on the way.
    """

    config: StressConfig
    subjects: dict[int, tuple[Subject, ...]]
    attacks: tuple[PlannedAttack, ...]
    safe_attacks: tuple[PlannedAttack, ...]
    measurement: Measurement
    control_rows: dict[str, str]
    not_run: tuple[str, ...]
    aligned: ModelReference
    base: ModelReference
    work: Path

    def attacks_on(self, subject: Subject) -> tuple[PlannedAttack, ...]:
        """Return the attacks that a model meets."""
        return self.safe_attacks if subject.variant.kind == "safeinst" else self.attacks

    @property
    def settings(self) -> dict[str, Any]:
        """What the report says of how its figures came about."""
        return {
            **self.measurement.settings(),
            "readings": self.config.readings,
            "one_pair": SEED not in str(self.config.aligned_model),
            "attacks": {
                planned.attack.name: {
                    "learning_rates": list(planned.learning_rates),
                    "rows": len(planned.data.train),
                    "held_out": len(planned.data.held_out),
                    "rows_sha256": planned.rows,
                    "sft": dict(planned.attack.sft),
                    "lora": planned.attack.lora,
                    "response_only": planned.attack.response_only,
                    "source": planned.attack.source,
                }
                for planned in self.attacks
            },
        }


def open_matrix(config: StressConfig, work: Path) -> Matrix:
    """Find and check everything that needs no training.

    Args:
        config: What is asked for.
        work: Folder of what will be made on the way; nothing is written here.

    Returns:
        The matrix.

    Raises:
        ConfigError: If settings contradict each other, an attack or a control is not known, or a package is missing.
        PromptError: If prompts or rows cannot be read.
        CheckpointError: If a model cannot be read.
        PairingError: If the two models of a pair do not fit.
        UnsupportedModelError: If weights cannot be edited.
    """
    check_packages(lora=config.lora is not None)
    variants, not_run = _variants(config)
    attacks = [_attack(config, spec) for spec in config.attacks]
    _check_names(attacks)
    safe = [_with_safety(attack, config) for attack in attacks] if _has(variants, "safeinst") else []
    planned, planned_safe = (tuple(_planned(config, attack) for attack in some) for some in (attacks, safe))
    measurement = _measurement(config)
    pairs = {seed: _open_pair(config, seed) for seed in config.seeds}
    aligned, base = pairs[config.seeds[0]]
    rows = _control_rows(config, variants)
    unfit = _check_on_model(config, aligned, (*planned, *planned_safe), measurement, variants, rows)
    if unfit is not None:
        variants = [variant for variant in variants if variant.kind != "rescaled"]
        not_run.append(f"rescaled: {unfit}")
    subjects = {seed: _subjects(config, seed, pairs[seed], variants, work / f"seed-{seed}") for seed in config.seeds}
    return Matrix(
        config=config,
        subjects=subjects,
        attacks=planned,
        safe_attacks=planned_safe,
        measurement=measurement,
        control_rows={kind: rows_hash(examples) for kind, examples in rows.items()},
        not_run=tuple(not_run),
        aligned=_reference(config.aligned_model, aligned),
        base=_reference(config.base_model, base),
        work=work,
    )


def _variants(config: StressConfig) -> tuple[list[Variant], list[str]]:
    """The models, and the controls that cannot be made of what is given, with the reason."""
    names = list(CONTROLS if config.controls is None else config.controls)
    missing = {
        name: [f"--{data.replace('_', '-')}" for data in NEEDS.get(name, ()) if getattr(config, data) is None]
        for name in names
    }
    lacking = [f"{name} needs {' and '.join(data)}" for name, data in missing.items() if data]
    if lacking and config.controls is not None:
        raise ConfigError(f"Controls cannot be made: {'; '.join(lacking)}.")
    made = [name for name in names if not missing[name]]
    not_run = [f"{control}, which was not given" for control in lacking]
    if config.controls is not None:
        not_run += [f"{name}: not asked for" for name in CONTROLS if name not in names]
    return make_variants(config.hardened, made), not_run


def _check_on_model(
    config: StressConfig,
    aligned: Resolved,
    attacks: Sequence[PlannedAttack],
    measurement: Measurement,
    variants: Sequence[Variant],
    control_rows: Mapping[str, Sequence[Example]],
) -> UnsupportedModelError | None:
    """Check what needs the model itself; return what keeps it from being rescaled, where nobody asked for that."""
    model, tokenizer = load_model(aligned.folder, **_loading(config))
    check_measurement(model, tokenizer, measurement, here=config.workers is None)
    for planned in attacks:
        check_attack(model, tokenizer, planned.attack, planned.data)
    for rows in control_rows.values():
        check_control(model, tokenizer, config.control_training, rows)
    problem = why_not_rescaled(model) if _has(variants, "rescaled") else None
    if problem is not None and config.controls is not None:
        raise problem
    return problem


def _control_rows(config: StressConfig, variants: Sequence[Variant]) -> dict[str, list[Example]]:
    """What each kind of trained control is trained on."""
    given = {name: getattr(config, name) for name in ("safety_data", "calibration_data")}
    loaded = {name: load_examples(data) for name, data in given.items() if data is not None}
    if _has(variants, "refusal-matched"):
        split_benign(loaded["calibration_data"])  # it says whether they are enough
    return {kind: [row for name in NEEDS[kind] for row in loaded[name]] for kind in TRAINED if _has(variants, kind)}


def _has(variants: Sequence[Variant], kind: str) -> bool:
    return any(variant.kind == kind for variant in variants)


def _attack(config: StressConfig, spec: str | Attack) -> Attack:
    changes: dict[str, Any] = {"sft": config.sft} if config.sft else {}
    if config.lora is not None:
        changes["lora"] = config.lora
    return get_attack(spec, **changes)


def _check_names(attacks: Sequence[Attack]) -> None:
    names = [slug(attack.name).casefold() for attack in attacks]  # as they are called on disk
    twice = sorted({attack.name for attack, name in zip(attacks, names, strict=True) if names.count(name) > 1})
    if twice:
        raise ConfigError(f"Several attacks are called {', '.join(twice)}: pass Attacks with names of their own.")


def _with_safety(attack: Attack, config: StressConfig) -> Attack:
    """The same attack with the paper's share of safety examples."""
    share = attack.safe_instruct_share or SAFE_SHARE
    return replace(attack, safe_instruct_share=share, safe_instruct_data=str(config.safety_data))


def _planned(config: StressConfig, attack: Attack) -> PlannedAttack:
    data = load_attack(attack)
    planned_steps(len(data.train), attack.sft)  # it checks the settings
    rates = config.learning_rates
    if rates is None:
        own = attack.sft.get("learning_rate")
        if own is None:
            raise ConfigError(f"The attack '{attack.name}' has no learning rate of its own: pass learning_rates.")
        rates = [float(f"{own * factor:.3g}") for factor in LR_FACTORS]
    return PlannedAttack(attack, data, rows_hash(data.train), tuple(sorted(rates)))


def _measurement(config: StressConfig) -> Measurement:
    return Measurement(
        prompts=load_all_prompts(config.prompts, config.n),
        judge=config.judge,
        template=config.template,
        max_new_tokens=config.max_new_tokens,
        batch_size=config.batch_size,
        system_prompt=config.system_prompt,
        utility=config.utility,
        utility_data=None if config.utility_data is None else str(config.utility_data),
        utility_n=config.utility_n,
    )


def _open_pair(config: StressConfig, seed: int) -> tuple[Resolved, Resolved]:
    """Files of a seed's pair, after every check that needs no numbers."""
    names = config.pair(seed)
    aligned = resolve(names[0], revision=config.revision)
    base = resolve(names[1], revision=config.base_revision, files=BASE_FILES)
    adapters = [found.reference.name_or_path for found in (aligned, base) if is_adapter(found.folder)]
    if adapters:
        raise CheckpointError(
            f"{' and '.join(adapters)}: expected a whole model, got an adapter; merge it into its model first."
        )
    for lox in config.hardened:
        settings = replace(lox, base_model_name_or_path=str(base.folder), revision=None)
        plan_hardening(aligned.folder, settings, trust_remote_code=config.trust_remote_code)
    return aligned, base


def _subjects(
    config: StressConfig, seed: int, pair: tuple[Resolved, Resolved], variants: Sequence[Variant], work: Path
) -> tuple[Subject, ...]:
    """The models of one seed."""
    aligned, base = (str(found.folder) for found in pair)
    weights = fingerprint(*(found.folder for found in pair))
    shared = (seed, aligned, base, weights, work, config.hardened[0], _loading(config))
    return tuple(Subject(variant, *shared) for variant in variants)


def _loading(config: StressConfig) -> dict[str, Any]:
    return {"dtype": config.dtype, "device": config.device, "trust_remote_code": config.trust_remote_code}


def _reference(name: str | Path, found: Resolved) -> ModelReference:
    """As it was named, a seed's place left open."""
    return ModelReference(str(name), found.reference.revision)
