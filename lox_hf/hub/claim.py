"""What a published model says of itself: its settings and the two models it was made of."""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from lox_hf.config import LoxConfig
from lox_hf.errors import CheckpointError, ConfigError
from lox_hf.hub.artefact import read_report
from lox_hf.markdown import one_line
from lox_hf.provenance import STAMP
from lox_hf.records import REPORT_NAME, HardeningReport, ModelReference
from lox_hf.weights.folder import CARD, MODEL_CONFIG, card_metadata, model_config


@dataclass(frozen=True)
class Claim:
    """A published model's own account.

    Attributes:
        config: The settings, with the base's name and revision.
        aligned: The aligned model.
        problems: Where the account contradicts itself.
    """

    config: LoxConfig
    aligned: ModelReference
    problems: tuple[str, ...] = ()

    def by(self, aligned: str | Path | None, base: str | Path | None) -> "Claim":
        """Take other places for the two models: a copy, or a name that has changed; its revision is then the newest.

        Args:
            aligned: Where the aligned model lies; None where the claim says.
            base: Where the base lies; None where the claim says.

        Returns:
            The claim with these places.
        """
        config, reference = self.config, self.aligned
        if base is not None and str(base) != config.base_model_name_or_path:
            config = replace(config, base_model_name_or_path=str(base), revision=None)
        if aligned is not None and str(aligned) != reference.name_or_path:
            reference = ModelReference(str(aligned))
        return Claim(config, reference, self.problems)


def read_stamp(folder: Path, name: str) -> Claim:
    """Read the account of a hardened checkpoint: the stamp, held against the report and the card where there are any.

    Args:
        folder: Folder with its small files.
        name: How messages call it.

    Returns:
        The account.

    Raises:
        CheckpointError: If there is no stamp, it names no aligned model, or report or card cannot be read.
        ConfigError: If its settings are invalid.
    """
    stamp = model_config(folder).get(STAMP)
    if not isinstance(stamp, dict):
        raise CheckpointError(
            f"'{name}' does not say that LoX hardened it: its {MODEL_CONFIG} has no {STAMP}. Nothing can be verified."
        )
    aligned, revision = stamp.get("aligned_model_name_or_path"), stamp.get("aligned_revision")
    if not isinstance(aligned, str) or not isinstance(revision, str | None):
        raise CheckpointError(f"The {STAMP} of '{name}' does not name the aligned model: nothing can be verified.")
    known = {item.name for item in fields(LoxConfig)}
    config = make_config({key: value for key, value in stamp.items() if key in known}, f"The {STAMP} of '{name}'")
    reference = ModelReference(aligned, revision)
    report = read_report(folder)
    problems = () if report is None else _contradictions(config, reference, report)
    return Claim(config, reference, (*problems, *_card_contradictions(config, reference, card_metadata(folder))))


def make_config(settings: dict[str, Any], what: str) -> LoxConfig:
    """Build a config from a file's settings.

    Args:
        settings: Settings by name.
        what: How messages call the file.

    Returns:
        The config.

    Raises:
        ConfigError: If they are invalid.
    """
    try:
        return LoxConfig.from_dict(settings)
    except ConfigError as error:
        raise ConfigError(f"{what} is not valid: {error}") from error


def _contradictions(config: LoxConfig, aligned: ModelReference, report: HardeningReport) -> tuple[str, ...]:
    """Where the stamp and the report do not say the same."""
    base = report.base or ModelReference(config.base_model_name_or_path or "", config.revision)
    said = {
        **report.config,
        "aligned model": report.aligned,
        "base_model_name_or_path": base.name_or_path,
        "revision": base.revision or report.config.get("revision"),
    }
    stamped = {**config.to_dict(), "aligned model": aligned}
    return tuple(
        f"{name}: the stamp says {_shown(stamped[name])}, {REPORT_NAME} says {_shown(said[name])}"
        for name in stamped
        if name in said and stamped[name] != said[name]
    )


def _card_contradictions(config: LoxConfig, aligned: ModelReference, card: dict[str, Any]) -> tuple[str, ...]:
    """Where the card's own fields, which readers go by, do not say what the stamp says."""
    said = card.get("lox")
    if not isinstance(said, dict):
        return ()
    base = ModelReference(config.base_model_name_or_path or "", config.revision)
    stamped = {"r": "full" if config.r is None else config.r, "alpha": config.alpha}
    found = {name: said.get(name) for name in stamped}
    for role, model in (("aligned model", aligned), ("base", base)):
        fields_of = said.get(role.split()[0])
        named = fields_of if isinstance(fields_of, dict) else {}
        stamped |= {role: one_line(model.name_or_path), f"{role}'s revision": model.revision}
        found |= {role: named.get("model"), f"{role}'s revision": named.get("revision")}
    return tuple(
        f"{name}: the stamp says {_shown(stamped[name])}, {CARD} says {_shown(value)}"
        for name, value in found.items()
        if value is not None and value != stamped[name]
    )


def _shown(value: object) -> str:
    text = f"{value.name_or_path} at {value.revision}" if isinstance(value, ModelReference) else repr(value)
    return " ".join(text.split())[:200]
