"""Likelihood of long token sequences: in windows, in padded batches, every token predicted once."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOGITS_BYTES = 1 << 30
"""What the float32 logits of a batch may take."""
MOST_WINDOWS = 64


@dataclass(frozen=True)
class Window:
    """Part of a sequence.

    Attributes:
        ids: Its token ids.
        predicted: How many of the last of them are predicted in this window; the others only stand before them.
    """

    ids: list[int]
    predicted: int


def split(ids: list[int], length: int, stride: int) -> Iterator[Window]:
    """Split a sequence into windows, so that each token but the very first is predicted in one of them.

    Args:
        ids: The sequence.
        length: Longest window, in tokens.
        stride: Tokens from one window's beginning to the next one's, below `length`.

    Yields:
        The windows in their order.

    Example:
        >>> [window.predicted for window in split(list(range(10)), length=4, stride=2)]
        [3, 2, 2, 2]
    """
    end = 1  # nothing stands before the first token
    for begin in range(0, len(ids), stride):
        known, end = end, min(begin + length, len(ids))
        if end > known:
            yield Window(ids[begin:end], end - known)


def fitting_windows(model: "PreTrainedModel", longest: int) -> int:
    """Return how many windows of a length are read at once, for logits of 1 GiB in float32 and 64 windows at most."""
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    return max(1, min(MOST_WINDOWS, LOGITS_BYTES // (4 * longest * vocabulary)))


def negative_log_likelihood(model: "PreTrainedModel", windows: Sequence[Window]) -> float:
    """Return -sum log p over the predicted tokens of a batch; each log p is float32, the sum float64.

    Args:
        model: A causal language model in evaluation mode.
        windows: The batch.

    Returns:
        The sum, in nats.
    """
    logits, ids = padded_logits(model, windows)
    return sum(map(_loss, logits, ids, windows))


@torch.no_grad()
def padded_logits(model: "PreTrainedModel", windows: Sequence[Window]) -> tuple[Tensor, Tensor]:
    """Read a batch of windows of any lengths.

    Args:
        model: A causal language model in evaluation mode.
        windows: The batch.

    Returns:
        Logits of shape (windows, longest, vocabulary) in the model's dtype, and the token ids, (windows, longest);
        each row begins with its window, and means nothing behind it.
    """
    width = max(len(window.ids) for window in windows)
    ids = torch.zeros(len(windows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, window in enumerate(windows):  # padded on the right, where no token that is predicted looks
        ids[row, : len(window.ids)] = torch.tensor(window.ids)
        mask[row, : len(window.ids)] = 1
    ids, mask = ids.to(model.device), mask.to(model.device)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    # Learnt prompts have places of their own in front.
    return logits[:, -width:], ids.to(logits.device)


def _loss(logits: Tensor, ids: Tensor, window: Window) -> float:
    """Sum over one row: a whole batch in float32 would take twice the room that its bfloat16 does."""
    end = len(window.ids)
    start = end - window.predicted
    losses = nn.functional.cross_entropy(logits[start - 1 : end - 1].float(), ids[start:end], reduction="none")
    return losses.double().sum().item()
