"""A checkpoint whose weights are not there: names, shapes and dtypes as transformers would save them."""

from pathlib import Path

import torch

from lox_hf.config import ALL_LINEAR, LoxConfig
from lox_hf.errors import UnsupportedModelError
from lox_hf.hub_files import Resolved
from lox_hf.provenance import STAMP, check_not_hardened
from lox_hf.records import FROM_CONFIG, HardeningPlan, ModelReference
from lox_hf.weights.folder import MODEL_CONFIG, WEIGHT_SUFFIXES, model_config, side_files
from lox_hf.weights.live import as_checkpoint, linear_modules, meta_model
from lox_hf.weights.selection import select
from lox_hf.weights.source import INDEX_NAME, TensorInfo

SAME_TENSORS = "a base of the same tensors"


def has_no_weights(folder: Path) -> bool:
    """Whether a folder has a model's `config.json` and no weights, in whatever form."""
    return (folder / MODEL_CONFIG).is_file() and not any(
        path.suffix in WEIGHT_SUFFIXES or path.name == INDEX_NAME for path in folder.iterdir()
    )


def plan_from_config(
    aligned: Resolved, config: LoxConfig, *, trust_remote_code: bool = False, allow_repeat: bool = False
) -> HardeningPlan:
    """Plan hardening of a checkpoint that is not there: its model is built on the meta device. The base is not read.

    Args:
        aligned: Folder with the model's `config.json`.
        config: Settings.
        trust_remote_code: Run the modelling code that the folder brings.
        allow_repeat: Accept a model that is hardened already.

    Returns:
        The plan; it says that it is from the config.

    Raises:
        CheckpointError: If transformers cannot build the model.
        ConfigError: If the settings do not fit it.
        UnsupportedModelError: If the config is of a quantised checkpoint, whose tensors transformers alone knows.
        AlreadyHardenedError: If the model is hardened and `allow_repeat` is not set.
    """
    values, name = model_config(aligned.folder), aligned.reference.name_or_path
    if not allow_repeat:
        check_not_hardened(values.get(STAMP), name)
    if values.get("quantization_config"):
        raise UnsupportedModelError(
            f"'{name}' has no weights, and how its quantised ones are stored is not in its config: remove "
            f"quantization_config from {MODEL_CONFIG} to plan the full-precision checkpoint, or download the weights."
        )
    model = meta_model(aligned.folder, trust_remote_code=trust_remote_code)
    infos = planned_infos(model)
    linear = linear_modules(model) if config.target_modules == ALL_LINEAR else ()
    return HardeningPlan(
        aligned=aligned.reference,
        base=ModelReference(config.base_model_name_or_path or SAME_TENSORS, config.revision),
        base_found_in=FROM_CONFIG,
        tensors=tuple(select(infos, config, linear)),
        total_bytes=sum(info.size_bytes for info in infos.values()),
        files=tuple(map(str, side_files(aligned.folder)[0])),
    )


def planned_infos(model: torch.nn.Module) -> dict[str, TensorInfo]:
    """Shape and dtype of every tensor that a model without weights would have in its checkpoint.

    Args:
        model: A transformers model on the meta device; its config names the dtype, float32 where it names none.

    Returns:
        What is known of each tensor by checkpoint name.
    """
    dtype = getattr(model.config, "dtype", None) or torch.float32
    wider = tuple(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    infos = {}
    for name, tensor in as_checkpoint(model, model.state_dict()).items():
        stored = dtype if tensor.is_floating_point() and not name.endswith(wider) else tensor.dtype
        infos[name] = TensorInfo(tuple(tensor.shape), stored, str(stored).removeprefix("torch."))
    return infos
