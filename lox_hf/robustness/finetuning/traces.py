"""What a trainer leaves behind in a model, and how it is taken away again."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CHANGED = ("forward", "gradient_checkpointing", "training")
"""Attributes of modules that training changes, besides those that it adds."""


@contextmanager
def left_plain(model: "PreTrainedModel") -> Iterator[None]:
    """Take away afterwards whatever TRL, accelerate and PEFT have hung into a model or set in its configs.

    Weights stay as they are by then. Modules that were exchanged for others are not put back.

    Args:
        model: The model.
    """
    modules = [vars(module) for module in model.modules()]
    found = {id(config): config for attributes in modules if (config := attributes.get("config")) is not None}
    configs = [vars(config) for config in (*found.values(), model.generation_config) if config is not None]
    before = [(attributes, dict(attributes), _hooks(attributes)) for attributes in modules]
    configs_before = [(settings, dict(settings)) for settings in configs]
    trained = [(weight, weight.requires_grad) for weight in model.parameters()]
    try:
        yield
    finally:
        for attributes, old, hooks in before:
            for name in attributes.keys() - old.keys():
                del attributes[name]
            attributes.update({name: old[name] for name in _CHANGED if name in old})
            for name, functions in hooks.items():
                attributes[name].clear()
                attributes[name].update(functions)
        for settings, old in configs_before:
            settings.clear()
            settings.update(old)
        for weight, requires_grad in trained:
            weight.requires_grad_(requires_grad)


@contextmanager
def plain_forward(wrapped: nn.Module, model: nn.Module, forward: Any) -> Iterator[None]:
    """Take off, for a while, the loss head and the mixed precision that a trainer has hung into a model.

    A model that is measured in the middle of a training then computes as it does before and after it.

    Args:
        wrapped: The model as the trainer has it, perhaps a `PeftModel` around the other.
        model: The model itself.
        forward: What its own attributes had as "forward" before the training; None where they had nothing.
    """
    hung = [(vars(module), vars(module).pop("forward", None)) for module in dict.fromkeys((wrapped, model))]
    if forward is not None:
        vars(model)["forward"] = forward
    try:
        yield
    finally:
        for attributes, theirs in hung:
            attributes.pop("forward", None)
            if theirs is not None:
                attributes["forward"] = theirs


def _hooks(attributes: Mapping[str, Any]) -> dict[str, dict[Any, Any]]:
    """A module's hooks; they are restored in place, as their owners take them off by these very dicts."""
    return {name: dict(value) for name, value in attributes.items() if "_hooks" in name and isinstance(value, dict)}
