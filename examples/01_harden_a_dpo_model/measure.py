"""What can be measured on held-out pairs: which answer a model finds likelier, and how sure such a share is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from preferences import Preference
from transformers import PreTrainedModel, PreTrainedTokenizerBase

BATCH = 32
Z_95 = 1.959963984540054


@dataclass(frozen=True)
class Share:
    """A share with the number it was counted over and its 95 % Wilson interval."""

    count: int
    n: int

    @property
    def interval(self) -> tuple[float, float]:
        """Lower and upper limit; NaN where nothing was counted."""
        if not self.n:
            return math.nan, math.nan
        share, z2 = self.count / self.n, Z_95**2 / self.n
        middle = (share + z2 / 2) / (1 + z2)
        half = math.sqrt(z2 * share * (1 - share) + z2**2 / 4) / (1 + z2)
        return middle - half, middle + half

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.count}/{self.n} = {100 * self.count / self.n:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


def keep_short(pairs: Sequence[Preference], tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> list[Preference]:
    """Keep the pairs that fit whole: one cut short would be compared without the end of an answer."""
    if not pairs:
        return []
    lengths = [
        [len(ids) for ids in tokenizer([pair.prompt + getattr(pair, answer) for pair in pairs]).input_ids]
        for answer in ("chosen", "rejected")
    ]
    # One more for the end token.
    return [pair for pair, *both in zip(pairs, *lengths, strict=True) if max(both) < max_tokens]


@torch.inference_mode()
def answer_log_likelihoods(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Preference]
) -> torch.Tensor:
    """Return log p(answer | prompt) of chosen and rejected, end token included; (n, 2), float64, in nats."""
    rows = []
    for pair in pairs:
        prompt = tokenizer(pair.prompt, add_special_tokens=False).input_ids
        for answer in (pair.chosen, pair.rejected):
            ids = [*tokenizer(answer, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
            rows.append((prompt + ids, len(prompt)))
    # Alike in length side by side, so that little is padding.
    order = sorted(range(len(rows)), key=lambda index: len(rows[index][0]))
    result = torch.zeros(len(rows), dtype=torch.float64)
    for start in range(0, len(rows), BATCH):
        batch = order[start : start + BATCH]
        width = len(rows[batch[-1]][0])
        ids = torch.tensor([rows[i][0] + [0] * (width - len(rows[i][0])) for i in batch], device=model.device)
        logits = model(input_ids=ids).logits[:, :-1].float()
        scores = -torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").double()
        for row, index in zip(scores, batch, strict=True):
            tokens, prompt_length = rows[index]
            result[index] = row[prompt_length - 1 : len(tokens) - 1].sum().cpu()
    return result.view(-1, 2)


def prefers_chosen(log_likelihoods: torch.Tensor) -> torch.Tensor:
    """Tell for which pairs chosen is the likelier answer; also of rewards, which are differences of these."""
    return log_likelihoods[:, 0] > log_likelihoods[:, 1]


def share_of(outcomes: torch.Tensor) -> Share:
    """Count the outcomes that are true."""
    return Share(int(outcomes.sum()), len(outcomes))


def dpo_loss(rewards: torch.Tensor, beta: float) -> float:
    """Return DPO's mean loss, -log sigmoid(beta * (reward of chosen - reward of rejected)); ln 2 for the reference."""
    return -torch.nn.functional.logsigmoid(beta * (rewards[:, 0] - rewards[:, 1])).mean().item()


def mcnemar(before: torch.Tensor, after: torch.Tensor) -> tuple[int, int, float]:
    """Compare two models on the same pairs.

    Args:
        before: Outcome by pair of the one model.
        after: Outcome by pair of the other.

    Returns:
        Pairs won, pairs lost, and the exact two-sided p-value of McNemar's test.
    """
    won, lost = int((after & ~before).sum()), int((before & ~after).sum())
    tail = sum(math.comb(won + lost, count) for count in range(min(won, lost) + 1)) / 2 ** (won + lost)
    return won, lost, min(1.0, 2 * tail)
