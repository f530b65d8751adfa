"""The whole demonstration: train pairs, harden them, attack them by fine-tuning, and say what came out."""

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

from lox_hf.config import LoxConfig
from lox_hf.demo.attacks import ATTACKS, CALIBRATION_NAME, SAFETY_NAME, DemoAttack, write_attacks
from lox_hf.demo.measure import LONGEST_ANSWER, Scores, score
from lox_hf.demo.pair import QUESTIONS_NAME, load, seed_folder, trained_pair
from lox_hf.demo.pairs import train_pairs
from lox_hf.demo.routes import Agreement, harden_three_ways
from lox_hf.demo.training import Recipe, one_thread
from lox_hf.errors import ConfigError, LoxError
from lox_hf.records import JsonRecord, StressReport
from lox_hf.robustness.attacks.recipe import Attack, meant
from lox_hf.robustness.checks import check_packages
from lox_hf.robustness.controls import ControlTraining
from lox_hf.robustness.settings import SEED, StressConfig
from lox_hf.robustness.stress import stress_test
from lox_hf.robustness.variants import make_variants

SEEDS = (0, 1, 2)
HARDENED = (LoxConfig(r=2, alpha=0.5), LoxConfig(r=2, alpha=1.0))
"""The paper's alpha of 1.25 and more breaks the small models' answers."""
CONTROLS = ("random",)
MOST_WORKERS = 8
ALL, DEFAULT = "all", "default"
ROWS_NAME = "attack-rows"
CAVEAT = (
    "This is a toy: 0.4 M parameters, an invented world, a few seeds. LoX delays the loss of refusals in fine-tuning, "
    "it does not prevent it, and how much it delays varies a lot from seed to seed. Part of a gain can be plain "
    "refusing."
)


@dataclass(frozen=True)
class ModelResult(JsonRecord):
    """One row of the table of the first seed.

    Attributes:
        name: "base", "aligned", or "hardened" with its alpha.
        folder: Its checkpoint.
        scores: What it answered.
    """

    name: str
    folder: str
    scores: Scores

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Build the record with its scores."""
        return super().from_dict({**data, "scores": Scores.from_dict(data["scores"])})


@dataclass(frozen=True)
class DemoReport(JsonRecord):
    """What the demonstration did and found.

    Attributes:
        seed: The first seed, whose pair the next three belong to.
        folder: Where its checkpoints are.
        results: Its base and aligned model, and the hardened one at each strength, before any attack.
        agreements: How far the three ways to a hardened model are apart, at each strength.
        questions: The held-out questions as a prompt set, a file.
        stress: The attacks on the models of all seeds.
        stress_dir: Where the stress test's pages and figures are.
        seconds: Wall time, in seconds.
        caveat: What these numbers do not say.
    """

    seed: int
    folder: str
    results: tuple[ModelResult, ...]
    agreements: tuple[Agreement, ...]
    questions: str
    stress: StressReport
    stress_dir: str
    seconds: float
    caveat: str = CAVEAT

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Build the report with its nested records."""
        results = tuple(ModelResult.from_dict(item) for item in data["results"])
        agreements = tuple(Agreement.from_dict(item) for item in data["agreements"])
        stress = StressReport.from_dict(data["stress"])
        return super().from_dict({**data, "results": results, "agreements": agreements, "stress": stress})


def tell_story(
    output_dir: str | Path,
    seeds: Sequence[int] = SEEDS,
    attacks: Sequence[str] = (DEFAULT,),
    *,
    cache_dir: str | Path | None = None,
    controls: Sequence[str] = CONTROLS,
    recipe: Recipe | None = None,
    sft: Mapping[str, Any] = MappingProxyType({}),
    workers: int | None = None,
    progressbar: bool | None = None,
) -> DemoReport:
    r"""Train small pairs, harden them three ways, and attack them by fine-tuning, with and without LoX.

    Under five minutes on two cores. The pairs stay in their folder and are used again; a killed run goes on.

    Args:
        output_dir: Folder of everything.
        seeds: Seeds of the pairs, and of the attacks on them.
        attacks: Names of attacks, "default" or "all".
        cache_dir: Folder that keeps the pairs of all seeds, each in `seed-N`; None takes the output folder.
        controls: Controls beside the hardened models.
        recipe: How the pairs are trained; None takes the defaults, to which the demonstration's numbers belong.
        sft: Settings of TRL's SFTConfig in place of the attacks' own.
        workers: Processes side by side, of one thread each; None takes one per core. They change no number.
        progressbar: Show progress bars; None shows them on a terminal only.

    Returns:
        The numbers and where everything is.

    Raises:
        ConfigError: If an attack or a control is not known, or a package is missing.
        OutputError: If a folder holds something else, or cannot be written.
        LoxError: If peft is not installed.

    Example:
        >>> report = tell_story("lox-demo")  # doctest: +SKIP
        >>> print("\n".join(report.stress.headline))  # doctest: +SKIP
    """
    if find_spec("peft") is None:
        raise LoxError("The demonstration shows the adapter as well and needs peft: pip install 'lox-hf[peft]'.")
    started = time.perf_counter()
    output = Path(output_dir).expanduser().absolute()
    pairs = Path(cache_dir or output).expanduser().absolute()
    workers = workers or min(MOST_WORKERS, os.cpu_count() or 1)
    # Mistakes show here, before minutes of training.
    config = _stress_config(pairs, output / ROWS_NAME, seeds, choose_attacks(attacks), controls, workers, sft)
    check_packages(lora=False)
    make_variants(HARDENED, controls)
    train_pairs(seeds, pairs, recipe, workers=workers, progressbar=progressbar)
    base, aligned = trained_pair(seeds[0], pairs, recipe)
    results = [_measure("base", base), _measure("aligned", aligned)]
    agreements = []
    for lox in HARDENED:
        hardened = aligned.parent / f"hardened-alpha-{lox.alpha:g}"
        agreements.append(harden_three_ways(base, aligned, hardened, lox))
        results.append(_measure(f"hardened alpha {lox.alpha:g}", hardened))
    if not (output / ROWS_NAME).exists():
        write_attacks(output / ROWS_NAME)
    stress = stress_test(config, output / "stress", progressbar=progressbar)
    return DemoReport(
        seed=seeds[0],
        folder=str(aligned.parent),
        results=tuple(results),
        agreements=tuple(agreements),
        questions=str(aligned.parent / QUESTIONS_NAME),
        stress=stress,
        stress_dir=str(output / "stress"),
        seconds=time.perf_counter() - started,
    )


def choose_attacks(names: Sequence[str]) -> list[DemoAttack]:
    """Return attacks by name, in the order of the report.

    Args:
        names: Names, "default" or "all".

    Returns:
        The attacks.

    Raises:
        ConfigError: If one is not known.
    """
    known = {attack.name: attack for attack in ATTACKS}
    unknown = [name for name in names if name not in (*known, DEFAULT, ALL)]
    if unknown or not names:
        hint = meant(unknown[0], known) if unknown else ""
        raise ConfigError(
            f"There is no attack {', '.join(unknown)}; there are {', '.join([*known, DEFAULT, ALL])}.{hint}"
        )
    return [
        attack for attack in ATTACKS if attack.name in names or ALL in names or (attack.default and DEFAULT in names)
    ]


def _stress_config(
    pairs: Path,
    files: Path,
    seeds: Sequence[int],
    attacks: Sequence[DemoAttack],
    controls: Sequence[str],
    workers: int,
    sft: Mapping[str, Any],
) -> StressConfig:
    """The attacks as the package's own; learning rates are scanned on the first seed."""
    return StressConfig(
        aligned_model=pairs / f"seed-{SEED}" / "aligned",
        base_model=pairs / f"seed-{SEED}" / "base",
        attacks=[_attack(attack, files) for attack in attacks],
        hardened=HARDENED,
        controls=controls,
        seeds=seeds,
        scan_seeds=1,
        prompts=[seed_folder(seeds[0], pairs) / QUESTIONS_NAME],
        max_new_tokens=LONGEST_ANSWER,
        safety_data=files / SAFETY_NAME,
        calibration_data=files / CALIBRATION_NAME,
        control_training=ControlTraining(learning_rate=2e-4, match_steps=40, every=4),
        sft=sft,
        device="cpu",
        workers=workers,
    )


def _attack(attack: DemoAttack, files: Path) -> Attack:
    return Attack(
        name=attack.name,
        data=str(files / attack.file_name),
        sft=attack.sft,
        task="exact" if attack.held_out else "loss",
        held_out=attack.held_out,
        source=attack.about,
    )


def _measure(name: str, folder: Path) -> ModelResult:
    model, tokenizer = load(folder)
    with one_thread():
        return ModelResult(name, str(folder), score(model, tokenizer))
