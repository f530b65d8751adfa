"""One answer for all processes of a training run."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

Answer = TypeVar("Answer")


def are_many() -> bool:
    """Whether this process trains together with others."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def from_process_zero(make: Callable[[], Answer]) -> Answer:
    """Have process zero make something, and give it to all: what they decide by must be the same everywhere.

    Every process has to call this. An error of process zero is raised in all of them, so none waits for another.

    Args:
        make: Makes it; called in process zero only. What it returns is pickled.

    Returns:
        What process zero has made.

    Raises:
        Exception: What `make` raised.

    Example:
        >>> from_process_zero(lambda: 3)
        3
    """
    if not are_many():
        return make()
    held: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            held[0] = make()
        except Exception as error:
            held[1] = error
    dist.broadcast_object_list(held, src=0)
    if held[1] is not None:
        raise held[1]
    return held[0]
