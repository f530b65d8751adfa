"""Loaded models under checkpoint names: views of their weights, without copies; and what their modules are."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lox_hf.errors import CheckpointError, UnsupportedModelError, listing


class _KeepViews(TorchFunctionMode):
    """Make `contiguous` return its argument, so that splitting a fused weight gives views and not copies."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0] if func is Tensor.contiguous else func(*args, **(kwargs or {}))


def live_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return a model's weights by checkpoint name, as views: writing to one changes the model.

    Transformers fuses weights on loading (Mixtral's experts w1 and w3 become one `gate_up_proj`); here they are apart
    again, as in the files. Tied weights appear once.

    Args:
        model: A loaded model; anything but a PreTrainedModel keeps its own names.

    Returns:
        Views by checkpoint name.

    Raises:
        UnsupportedModelError: If weights are quantised, on the meta device, sharded, or cannot be viewed.
    """
    state = _untied(model, model.state_dict())
    check_plain(model, state)
    views = as_checkpoint(model, state)
    owned = {tensor.untyped_storage().data_ptr() for tensor in state.values()}
    copies = [name for name, view in views.items() if view.untyped_storage().data_ptr() not in owned]
    if copies:
        raise UnsupportedModelError(
            f"{type(model).__name__} stores {len(copies)} weights rearranged, so they cannot be edited in place: "
            f"{listing(copies)} Harden the files with harden_checkpoint instead."
        )
    return _once({name: views[name] for name in _file_order(state, views)})


def as_checkpoint(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename and split a state dict of this model to checkpoint names; views where that is possible.

    Args:
        model: The model, which knows how its weights are fused.
        state: Tensors by the model's own names; checkpoint names pass through.

    Returns:
        Tensors by checkpoint name.
    """
    state = _untied(model, state)
    if not hasattr(model, "config"):
        return state
    from transformers.core_model_loading import revert_weight_conversion

    with _KeepViews(), torch.no_grad():
        return revert_weight_conversion(cast("Any", model), state)


def check_plain(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Refuse weights that are not plain tensors in memory, by name of the scheme.

    Args:
        model: The model.
        state: Its weights.

    Raises:
        UnsupportedModelError: If weights are quantised, on the meta device, offloaded, or sharded over processes.
    """
    check_readable(model, state)
    name = type(model).__name__
    sharded = sorted({type(t).__name__ for t in state.values() if type(t).__name__ == "DTensor"})
    if sharded or any(hasattr(tensor, "ds_id") for tensor in model.parameters()):
        raise UnsupportedModelError(
            f"{name} is sharded over processes ({', '.join(sharded) or 'DeepSpeed ZeRO-3'}). "
            "Harden its files with harden_checkpoint."
        )


def check_readable(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Refuse weights whose numbers are not there to be read, by name of the scheme.

    Args:
        model: The model.
        state: Its weights, or pieces of them.

    Raises:
        UnsupportedModelError: If weights are quantised, on the meta device or offloaded.
    """
    name = type(model).__name__
    scheme = _quantisation(model) or next((type(t).__name__ for t in state.values() if _is_quantised(t)), None)
    if scheme:
        raise UnsupportedModelError(
            f"{name} is quantised ({scheme}); its numbers are codes, not weights. Put LoX on top with "
            "get_lox_model(model, config, aligned_model=FULL_PRECISION_FILES), or call model.dequantize() first."
        )
    meta = [key for key, tensor in state.items() if tensor.is_meta]
    if meta:
        raise UnsupportedModelError(
            f"{name} has {len(meta)} weights on the meta device (not loaded, or offloaded): {listing(meta, 5)} "
            "Load the model into memory, or harden its files with harden_checkpoint."
        )


def checkpoint_names(model: nn.Module) -> dict[str, list[str]]:
    """Map every live weight's name to the checkpoint names it is stored under; works on the meta device."""
    state = _untied(model, model.state_dict())
    return {name: list(as_checkpoint(model, {name: tensor})) for name, tensor in state.items()}


def linear_modules(model: nn.Module) -> set[str]:
    """Names, as in the checkpoint, of the modules that PEFT's "all-linear" takes: every linear layer but the head.

    Args:
        model: A loaded model, or one on the meta device.

    Returns:
        Module names.
    """
    from transformers.pytorch_utils import Conv1D

    find_head = getattr(model, "get_output_embeddings", None)
    head = find_head() if callable(find_head) else None
    linear = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head
    }
    return {
        stored.removesuffix(".weight")
        for live, names in checkpoint_names(model).items()
        if live in linear
        for stored in names
    }


def meta_model(folder: Path, *, trust_remote_code: bool = False) -> nn.Module:
    """Build a checkpoint's model without weights, to learn what its modules are.

    Args:
        folder: Checkpoint folder.
        trust_remote_code: Run the modelling code that the folder brings.

    Returns:
        The model on the meta device.

    Raises:
        CheckpointError: If transformers cannot build it.
    """
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        cls = getattr(transformers, (config.architectures or [""])[0], None)
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if cls is not None:
                return cls(config)
            return transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise CheckpointError(
            f"transformers cannot build the model of {folder}: {error} "
            "If it needs code from its repository and you trust it, pass trust_remote_code=True."
        ) from error


def _untied(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict without the second names of tied weights."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    return {name: tensor for name, tensor in state.items() if name not in tied}


def _once(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Leave out second names of a weight that is tied by hand, which `all_tied_weights_keys` does not know."""
    first: dict[tuple[object, ...], str] = {}
    for name, tensor in tensors.items():
        first.setdefault((tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.numel() or name), name)
    return {name: tensors[name] for name in first.values()}


def _file_order(state: Mapping[str, Tensor], views: Mapping[str, Tensor]) -> list[str]:
    """Checkpoint names in the order of the model's own weights."""
    rank = {tensor.untyped_storage().data_ptr(): number for number, tensor in enumerate(state.values())}
    return sorted(views, key=lambda name: rank[views[name].untyped_storage().data_ptr()])


def _quantisation(model: nn.Module) -> str | None:
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    if config is None:
        return None
    method = config.get("quant_method") if isinstance(config, dict) else getattr(config, "quant_method", None)
    return str(getattr(method, "value", method) or type(config).__name__)


def _is_quantised(tensor: Tensor) -> bool:
    module = type(tensor).__module__
    # Torch's own quantised layers keep packed weights, which are no tensors.
    return module.startswith(("bitsandbytes", "torchao", "hqq", "quanto")) or getattr(tensor, "is_quantized", True)
