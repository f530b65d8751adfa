"""The stamp that a hardened model carries in its config: what was done, to which model, against which base."""

from typing import Any

from lox_hf.config import LoxConfig
from lox_hf.errors import AlreadyHardenedError
from lox_hf.records import ModelReference
from lox_hf.version import __version__

STAMP = "lox_config"


def stamp(config: LoxConfig, aligned: ModelReference, base: ModelReference | None) -> dict[str, Any]:
    """Content of `config.lox_config` of a hardened model.

    Args:
        config: The settings.
        aligned: The aligned model.
        base: The model before alignment; None where the alignment was an adapter.

    Returns:
        The settings, both models with their revisions, and the version, as plain values.
    """
    return {
        "lox_version": __version__,
        "aligned_model_name_or_path": aligned.name_or_path,
        "aligned_revision": aligned.revision,
        **config.to_dict(),
        "base_model_name_or_path": base.name_or_path if base else config.base_model_name_or_path,
        "revision": (base.revision if base else None) or config.revision,
    }


def check_not_hardened(found: object, name: str) -> None:
    """Refuse a model that carries a stamp.

    Args:
        found: Content of the stamp; None where there is none.
        name: How messages call the model.

    Raises:
        AlreadyHardenedError: If there is a stamp.
    """
    if found is None:
        return
    settings = (
        ", ".join(f"{key} = {found.get(key)}" for key in ("r", "alpha")) if isinstance(found, dict) else "no settings"
    )
    raise AlreadyHardenedError(
        f"'{name}' is hardened by LoX already ({settings}); a second extrapolation is rarely meant. "
        "Start from the aligned model, or pass allow_repeat=True (--allow-repeat)."
    )
