"""What other jobs need first: directions of a pair, and controls that are trained."""

import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lox_hf.config import LoxConfig
from lox_hf.evaluation.models.loading import load_model
from lox_hf.records import JsonRecord, Rate
from lox_hf.robustness.attacks.examples import Example, load_examples
from lox_hf.robustness.controls import ControlTraining, match_refusals, over_refusal, retrain
from lox_hf.robustness.measuring.measure import Measurement
from lox_hf.robustness.subject import Subject, directions_name, directions_settings, save_checkpoint
from lox_hf.subspace import SafetySubspace


@dataclass(frozen=True)
class Prepared(JsonRecord):
    """What was made for other jobs: a folder in `work`.

    Attributes:
        note: What a reader of the report should know of it; empty where there is nothing.
    """

    note: str = ""


@dataclass(frozen=True)
class DirectionsJob:
    """Find the directions of a pair, once for all models that use them."""

    subject: Subject
    config: LoxConfig

    @property
    def path(self) -> str:
        """File of the result."""
        return f"prepared/seed-{self.subject.seed}/{directions_name(self.config)}.json"

    @property
    def leaves(self) -> Path:
        """Folder that it makes."""
        return self.subject.work / directions_name(self.config)

    def settings(self) -> dict[str, Any]:
        """What the directions depend on."""
        return {"weights": self.subject.weights, "config": directions_settings(self.config)}

    def run(self) -> Prepared:
        """Find and save them."""
        shutil.rmtree(self.leaves, ignore_errors=True)
        subject = self.subject
        found = SafetySubspace.from_models(subject.aligned, subject.base, self.config, progressbar=False)
        found.save_pretrained(self.leaves)
        return Prepared()

    def read(self, data: dict[str, Any]) -> Prepared:
        """Build the result."""
        return Prepared.from_dict(data)


@dataclass(frozen=True)
class ControlJob:
    """Train a control from the aligned model.

    Attributes:
        subject: The control.
        training: How.
        measurement: How over-refusal is read on the calibration prompts.
        rows: SHA-256 of the rows that it is trained on.
        safety_data: Prompts with refusals; "retrained" has no use for them.
        calibration_data: Harmless prompts with answers.
    """

    subject: Subject
    training: ControlTraining
    measurement: Measurement
    rows: str
    safety_data: str
    calibration_data: str

    @property
    def path(self) -> str:
        """File of the result."""
        return f"prepared/seed-{self.subject.seed}/{self.subject.slug}.json"

    @property
    def leaves(self) -> Path:
        """Folder that it makes."""
        return self.subject.work / self.subject.slug

    def settings(self) -> dict[str, Any]:
        """What the control depends on."""
        measurement = {**self.measurement.settings(), "prompts": None, "utility": None}
        training = {"rows": self.rows, "training": asdict(self.training)}  # the rows themselves, wherever they lie
        return {**self.subject.settings(), **training, "measurement": measurement}

    def run(self) -> Prepared:
        """Train it, and save it by one rename."""
        benign = load_examples(self.calibration_data)
        subject = self.subject
        if subject.variant.kind == "retrained":
            model, tokenizer = load_model(subject.aligned, **subject.loading)
            model, note = retrain(model, tokenizer, benign, training=self.training, seed=subject.seed), ""
        else:
            target = self._target(benign).share  # before the aligned model is loaded: one is in memory at a time
            model, tokenizer = load_model(subject.aligned, **subject.loading)
            shared = {"measurement": self.measurement, "training": self.training, "seed": subject.seed}
            safe = load_examples(self.safety_data)
            matched = match_refusals(model, tokenizer, target, safe, benign, **shared)
            model, note = matched.model, matched.describe()
        save_checkpoint(model, tokenizer, self.leaves)
        return Prepared(f"{subject.variant.name}, seed {subject.seed}: {note}" if note else "")

    def _target(self, benign: list[Example]) -> Rate:
        """Over-refusal of the hardened model on the calibration prompts."""
        hardened = replace(self.subject, variant=replace(self.subject.variant, kind="hardened"))
        model, tokenizer = hardened.load()
        return over_refusal(model, tokenizer, benign, measurement=self.measurement, training=self.training)

    def read(self, data: dict[str, Any]) -> Prepared:
        """Build the result."""
        return Prepared.from_dict(data)
