"""A hardened model that DPO would train away from its hardening, because the reference model lacks it."""

import warnings
from typing import Any

from lox_hf.provenance import STAMP


def warn_of_reference(trainer: Any) -> None:
    """Say so where a trainer's model is hardened and its reference model is not.

    TRL loads the reference of a full fine-tuning by the name that the model was loaded from, which is the model
    before it was hardened in memory; the loss then pulls the model back to that one.

    Args:
        trainer: Any trainer; one without a reference model is fine.
    """
    reference = getattr(trainer, "ref_model", None)
    if reference is None or not _is_hardened(trainer.model) or _is_hardened(reference):
        return
    warnings.warn(
        f"The model of {type(trainer).__name__} is hardened and its reference model is not, so training draws it back "
        "to the unhardened one: save the hardened model and load it from there, or pass a copy of it as ref_model.",
        stacklevel=3,
    )


def _is_hardened(model: Any) -> bool:
    return bool(getattr(getattr(model, "config", None), STAMP, None))
