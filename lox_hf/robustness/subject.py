"""A model of the matrix on one seed: where it comes from, how it is made, what it is called on disk."""

import gc
import hashlib
import json
import re
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from lox_hf.config import LoxConfig
from lox_hf.evaluation.models.loading import load_model, quiet_transformers
from lox_hf.records import DriftReading
from lox_hf.robustness.variants import OF_THE_PAIR, Variant, edit_weights
from lox_hf.subspace import SafetySubspace
from lox_hf.training.monitor import read_drift
from lox_hf.weights.output_file import output_errors
from lox_hf.weights.writer import FolderWriter

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SAMPLE_BYTES, SAMPLES = 64, 64


@dataclass(frozen=True)
class Subject:
    """One model of the matrix on one seed.

    Attributes:
        variant: Which model.
        seed: The seed.
        aligned: Folder of the aligned model.
        base: Folder of the model before alignment.
        weights: Fingerprint of both.
        work: Folder of directions and trained controls of this seed.
        directions: Settings of the directions along which drift is read.
        loading: Arguments of `load_model`.
    """

    variant: Variant
    seed: int
    aligned: str
    base: str
    weights: str
    work: Path
    directions: LoxConfig
    loading: dict[str, Any] = field(default_factory=dict)

    @property
    def slug(self) -> str:
        """The model's name as a file name."""
        return slug(self.variant.name)

    def settings(self) -> dict[str, Any]:
        """What its figures depend on: its weights, and the directions along which drift is read."""
        return {
            "model": self.variant.settings(),
            "seed": self.seed,
            "weights": self.weights,
            "drift_along": directions_settings(self.directions),
            **self.loading,
        }

    def load(self) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
        """Load the model and edit its weights."""
        gc.collect()  # a trainer leaves cycles behind, and in them the model before, which would stay beside this one
        trained = self.variant.is_trained
        model, tokenizer = load_model(self.work / self.slug if trained else self.aligned, **self.loading)
        config = self.variant.config
        with quiet_transformers():
            subspace = self.subspace(config) if config is not None and config.r is not None else None
            edit_weights(model, self.variant, base_model=self.base, subspace=subspace, seed=self.seed)
        return model, tokenizer

    def drift(self, model: nn.Module) -> DriftReading:
        """Read the drift of the model, without its matrices."""
        return replace(read_drift(model, self.subspace(self.directions), self.base, progressbar=False), tensors=())

    def subspace(self, config: LoxConfig) -> SafetySubspace:
        """Read directions that were found before."""
        return SafetySubspace.from_pretrained(self.work / directions_name(config))


def fingerprint(*folders: Path) -> str:
    """Return a hash that tells checkpoints apart without reading all of them.

    Args:
        folders: Folders of safetensors files.

    Returns:
        SHA-256 of the files' names, sizes, and 64 pieces of each.
    """
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted(folder.glob("*.safetensors")):
            size = path.stat().st_size
            digest.update(f"{path.name} {size}".encode())
            with path.open("rb") as file:
                for number in range(SAMPLES):
                    file.seek(max(0, size - SAMPLE_BYTES) * number // (SAMPLES - 1))
                    digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def slug(name: str) -> str:
    """Return a name as a file name; one that loses more than its spaces gets a part of its hash.

    Args:
        name: The name.

    Returns:
        The file name.

    Example:
        >>> slug("hardened r=6 alpha=1.25"), slug("../up")
        ('hardened-r=6-alpha=1.25', 'up-8c722b8a')
    """
    kept = re.sub(r"[^A-Za-z0-9._=-]+", "-", name).strip("-.")
    return kept if kept == name.replace(" ", "-") else f"{kept}-{_hash(name)[:8]}".lstrip("-")


def directions_settings(config: LoxConfig) -> dict[str, Any]:
    """Return what directions depend on besides the pair; alpha is none of it."""
    return {name: value for name, value in config.to_dict().items() if name not in ("alpha", *OF_THE_PAIR)}


def directions_name(config: LoxConfig) -> str:
    """Return the folder of the directions that settings ask for."""
    return f"directions-{_hash(json.dumps(directions_settings(config), sort_keys=True))[:12]}"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def save_checkpoint(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", folder: Path) -> None:
    """Save a model with its tokenizer, by one rename; what an earlier process left there goes.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        folder: Where it goes.

    Raises:
        OutputError: If the disk does not take it.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with quiet_transformers(), FolderWriter(folder) as writer:
        with output_errors(folder):
            model.save_pretrained(writer.partial)
            tokenizer.save_pretrained(writer.partial)
        writer.publish()
