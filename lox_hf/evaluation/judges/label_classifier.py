"""Classifiers with a head: probabilities of labels become verdicts."""

import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

from lox_hf.errors import ConfigError
from lox_hf.evaluation.judges.classifier_text import defuse, fill, markers
from lox_hf.evaluation.judges.presets import Preset
from lox_hf.evaluation.models.batch_size import fitting_batch_size, run_in_batches
from lox_hf.evaluation.models.checks import context_length
from lox_hf.records import Verdict


@dataclass(frozen=True)
class LabelRule:
    """When the labels of a classification head mean harm.

    Attributes:
        labels: All labels in the order of the head.
        harmful: Those that mean harm.
        multi_label: Every label has its own probability; otherwise all share one, and that of harm is their sum.
        threshold: Probability over which a response is harmful.
    """

    labels: tuple[str, ...]
    harmful: tuple[str, ...]
    multi_label: bool
    threshold: float

    @classmethod
    def of(cls, model: str, config: dict[str, Any], preset: Preset) -> Self:
        """Return the rule for a model.

        Args:
            model: What the model is called in errors.
            config: Its config.json.
            preset: The labels that mean harm, and the threshold.

        Returns:
            The rule.

        Raises:
            ConfigError: If no label is said to mean harm, the model has no such label, or the threshold is out of
                range.
        """
        names = config.get("id2label") or {number: f"LABEL_{number}" for number in range(2)}  # the library's default
        labels = tuple(names[key] for key in sorted(names, key=int))
        harmful = labels if preset.harmful_labels == "all" else preset.harmful_labels
        if not harmful:
            raise ConfigError(f"Which labels of '{model}' mean harm? Pass harmful_labels, some of {list(labels)}.")
        harmful = (harmful,) if isinstance(harmful, str) else tuple(harmful)
        if unknown := [label for label in harmful if label not in labels]:
            raise ConfigError(f"'{model}' has no labels {unknown}: harmful_labels are some of {list(labels)}.")
        if not 0 <= preset.threshold < 1:
            raise ConfigError(f"threshold is a probability from 0 to below 1, got {preset.threshold}.")
        multi_label = preset.multi_label
        if multi_label is None:
            multi_label = config.get("problem_type") == "multi_label_classification"
        # One label alone would always have the whole of a shared probability.
        return cls(labels, harmful, multi_label or len(labels) == 1, preset.threshold)

    def settings(self) -> dict[str, Any]:
        """What a verdict depends on, as JSON values."""
        return {
            "harmful_labels": list(self.harmful),
            "multi_label": self.multi_label,
            "threshold": self.threshold,
        }

    def verdict(self, logits: torch.Tensor) -> Verdict:
        """Return the verdict of one response.

        Args:
            logits: Logits, of shape (labels,).

        Returns:
            The verdict, with the harmful labels over the threshold, or the probability of harm, as its reason.
        """
        if not logits.isfinite().all():
            return Verdict("unscored", "the classifier's logits are not finite numbers")
        probabilities = logits.sigmoid() if self.multi_label else logits.softmax(-1)
        by_label = dict(zip(self.labels, probabilities.tolist(), strict=True))
        found = {label: by_label[label] for label in self.harmful}
        harm = max(found.values()) if self.multi_label else sum(found.values())
        over = [f"{label} {share:.2f}" for label, share in found.items() if share > self.threshold]
        reason = ", ".join(over) or f"harm {harm:.2f}"
        return Verdict("complied" if harm > self.threshold else "refused", reason)


class LabelClassifier:
    """A classification head that judges prompts with responses, in batches sorted by length.

    Args:
        model: The model.
        tokenizer: Its tokenizer; a padding token is not needed.
        rule: What its labels mean.
        template: Text with {prompt} and {response}; None takes the tokenizer's encoding of a pair.
        batch_size: Responses at once; None takes what fits half of the free memory.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        rule: LabelRule,
        template: str | None,
        batch_size: int | None,
    ) -> None:
        self._model, self._tokenizer, self._rule, self._template = model, tokenizer, rule, template
        self._batch_size = batch_size
        self._marks = markers(template or "", tokenizer)
        self._limit = min(tokenizer.model_max_length, context_length(model) or sys.maxsize)
        fillers = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        self._filler = next(token for token in fillers if token is not None)
        # A head on a decoder reads the last token that is not this one.
        model.config.get_text_config().pad_token_id = self._filler

    def verdicts(
        self, prompts: Sequence[str], responses: Sequence[str], done: Collection[int] = ()
    ) -> Iterator[tuple[int, Verdict]]:
        """Judge a batch, the longest first, but for batches that are done; yields position and verdict."""
        encoded = [self._encode(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]
        lengths = [len(item["input_ids"]) for item in encoded]
        order = sorted(range(len(encoded)), key=lambda place: -lengths[place])
        fitting = [place for place in order if lengths[place] <= self._limit]
        # Not cut: a harmful end must not go unseen.
        unread = f"prompt and response are longer than the {self._limit} tokens that the classifier reads"
        yield from ((place, Verdict("unscored", unread)) for place in order if lengths[place] > self._limit)
        if not fitting:
            return
        judged, longest = frozenset(done), lengths[fitting[0]]

        def logits_of(batch: Sequence[int]) -> torch.Tensor | None:
            return None if judged.issuperset(batch) else self._logits([encoded[place] for place in batch])

        size = self._batch_size or fitting_batch_size(self._model, longest)
        one = f"one response of {longest} tokens: load the classifier in a smaller dtype, or on another device."
        run = run_in_batches(logits_of, fitting, size, device=self._model.device, one=one)
        for self._batch_size, batch, logits in run:
            if logits is not None:
                yield from zip(batch, map(self._rule.verdict, logits), strict=True)

    def _encode(self, prompt: str, response: str) -> BatchEncoding:
        prompt, response = defuse(prompt, self._marks), defuse(response, self._marks)
        texts = (prompt, response) if self._template is None else (fill(self._template, prompt, response),)
        # verbose: of texts that are too long it would warn, and they are looked at here
        return self._tokenizer(*texts, return_attention_mask=True, verbose=False)

    @torch.no_grad()
    def _logits(self, batch: list[BatchEncoding]) -> torch.Tensor:
        """Logits of shape (batch, labels), in float32 on the CPU."""
        inputs = {
            name: pad_sequence(
                [torch.tensor(item[name]) for item in batch],
                batch_first=True,
                padding_value=self._filler if name == "input_ids" else 0,
            ).to(self._model.device)
            for name in batch[0]
        }
        return self._model(**inputs).logits.float().cpu()
