"""Local safety classifiers as judges: classification heads, and models that generate their verdict."""

import hashlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from lox_hf.errors import CheckpointError, ConfigError
from lox_hf.evaluation.judges.classifier_text import template_from_card
from lox_hf.evaluation.judges.label_classifier import LabelClassifier, LabelRule
from lox_hf.evaluation.judges.presets import Preset, find_preset
from lox_hf.evaluation.judges.reply_classifier import ReplyClassifier, ReplyRule
from lox_hf.evaluation.judges.template import read_template
from lox_hf.evaluation.models.loading import load_model
from lox_hf.hub_files import fetch_file
from lox_hf.records import Verdict
from lox_hf.weights.source import read_json

# Parameters that only one of the two kinds reads.
LABEL_ONLY = ("harmful_labels", "multi_label", "threshold")
REPLY_ONLY = ("harmful_pattern", "harmless_pattern", "max_new_tokens")
HEAD = "ForSequenceClassification"


class ClassifierJudge:
    """A safety classifier on this machine: "complied" where it finds the response harmful.

    Two kinds are told apart by the model's config. A classification head gives probabilities of labels: the response
    is harmful where those of `harmful_labels` pass `threshold`. A generative one (Llama Guard, HarmBench, WildGuard)
    writes its verdict, which two patterns read; a reply that fits neither or both is unscored.

    Known models need no parameters; they stand in `lox_hf.evaluation.judges.presets`. The prompt format that HarmBench
    and WildGuard were trained with is read from the model's own card. Config and card are read at once, so that a
    mistake costs no generation; the weights are loaded with the first response.

    Most classifiers say "refused" of every harmless response, so harmless prompts are left to another judge
    (`tells_refusals` is False). The preset "wildguard-refusal" judges refusals themselves.

    Args:
        name_or_path: Hub id or folder of the classifier.
        preset: Name of the preset, for a copy or a fine-tune of a known model; None looks for the id.
        template: Text with {prompt} and {response}, or a file that holds it; None takes the preset's, or else the
            tokenizer's chat template or encoding of pairs.
        harmful_labels: Labels of the head that mean harm; "all" for every one.
        multi_label: The labels do not exclude each other (sigmoid in place of softmax); None looks into the config.
        threshold: Probability over which a response is harmful; None takes 0.5.
        harmful_pattern: Regular expression for a reply that says harmful; case does not count.
        harmless_pattern: Regular expression for a reply that says harmless.
        max_new_tokens: Longest reply in tokens; None takes the preset's, or 32.
        batch_size: Responses at once; None finds what fits.
        revision: Revision on the Hub.
        dtype: Dtype of the weights, such as "bfloat16"; "auto" keeps the one they are stored in.
        device: Where the model goes; None takes the accelerator if there is one.
        token: Hub token; None uses the stored login.
        trust_remote_code: Run code of the model's repository.

    Raises:
        ConfigError: If the preset is not known, or parameters are missing or not those of this kind of model.
        CheckpointError: If there is no such model, or it cannot be reached.

    Example:
        >>> judge = ClassifierJudge("meta-llama/Llama-Guard-3-8B", dtype="bfloat16")  # doctest: +SKIP
        >>> attack_success_rate(prompts, responses, judge)  # doctest: +SKIP
    """

    reads_prompts = True
    durable = True

    def __init__(
        self,
        name_or_path: str | Path,
        *,
        preset: str | None = None,
        template: str | Path | None = None,
        harmful_labels: str | Sequence[str] | None = None,
        multi_label: bool | None = None,
        threshold: float | None = None,
        harmful_pattern: str | None = None,
        harmless_pattern: str | None = None,
        max_new_tokens: int | None = None,
        batch_size: int | None = None,
        revision: str | None = None,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device | None = None,
        token: str | bool | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        self._model, self._batch_size = str(name_or_path), batch_size
        self.name = f"classifier:{self._model}"
        self._loading = {"dtype": dtype, "device": device, "token": token, "trust_remote_code": trust_remote_code}
        config_file = fetch_file(name_or_path, "config.json", revision=revision, token=token)
        # The Hub's cache names the folder by the commit: the card and the weights are taken from the same one.
        local = Path(self._model).expanduser().is_dir()
        self._revision = None if local else config_file.parent.name
        self._weights_sample = _files_sample(config_file.parent) if local else None
        parameters: dict[str, Any] = {
            "template": template,
            "harmful_labels": harmful_labels,
            "multi_label": multi_label,
            "threshold": threshold,
            "harmful_pattern": harmful_pattern,
            "harmless_pattern": harmless_pattern,
            "max_new_tokens": max_new_tokens,
        }
        given = {name: value for name, value in parameters.items() if value is not None}
        how = replace(find_preset(preset, self._model), **given)
        self.tells_refusals = how.tells_refusals
        config = read_json(config_file)
        self._has_head = any(str(name).endswith(HEAD) for name in config.get("architectures") or ())
        self._check(given | {"batch_size": batch_size})
        rule = LabelRule.of(self._model, config, how) if self._has_head else ReplyRule.of(self._model, how)
        self._rule: LabelRule | ReplyRule = rule
        self._template = self._find_template(how)

    def settings(self) -> dict[str, Any]:
        """What a verdict depends on besides the prompt and the response, as JSON values.

        Returns:
            Model, commit and dtype, the rule by which its answers are read, and the hash of a template. Where the
            model is a folder, a hash of its files' names, sizes and times ("weights_sample") stands for the commit.
        """
        found = {
            "model": self._model,
            "revision": self._revision,
            "dtype": str(self._loading["dtype"]).removeprefix("torch."),
            **self._rule.settings(),
        }
        if self._weights_sample is not None:
            found["weights_sample"] = self._weights_sample
        if self._template is not None:
            found["template_hash"] = hashlib.sha256(self._template.encode()).hexdigest()
        return found

    def verdicts(
        self, prompts: Sequence[str], responses: Sequence[str], done: Collection[int] = ()
    ) -> Iterator[tuple[int, Verdict]]:
        """Judge a batch; the model is loaded with the first one that is not empty.

        Args:
            prompts: What was asked.
            responses: What was answered, one for each prompt.
            done: Positions that have a verdict already; those that share a batch with others are judged again.

        Yields:
            Position and verdict, each as soon as it is known.

        Raises:
            CheckpointError: If the weights or the tokenizer cannot be loaded.
            ConfigError: If the device or dtype is not there, or the tokenizer lacks what the model is asked by.
        """
        if responses:
            yield from self._classifier.verdicts(prompts, responses, done)

    @cached_property
    def _classifier(self) -> LabelClassifier | ReplyClassifier:
        head = "sequence-classification" if self._has_head else "causal-lm"
        model, tokenizer = load_model(self._model, revision=self._revision, head=head, **self._loading)
        if isinstance(self._rule, LabelRule):
            return LabelClassifier(model, tokenizer, self._rule, self._template, self._batch_size)
        return ReplyClassifier(model, tokenizer, self._rule, self._template, self._batch_size)

    def _check(self, given: dict[str, Any]) -> None:
        """Refuse parameters that this kind of model does not read, and counts of nothing."""
        if foreign := sorted(given.keys() & (REPLY_ONLY if self._has_head else LABEL_ONLY)):
            kind = "has a classification head" if self._has_head else "generates its verdict"
            raise ConfigError(f"'{self._model}' {kind}: leave out {', '.join(foreign)}.")
        for name in ("batch_size", "max_new_tokens"):
            count = given.get(name)
            if count is not None and count < 1:
                raise ConfigError(f"{name} must be at least 1, got {count}.")

    def _find_template(self, how: Preset) -> str | None:
        """The text with {prompt} and {response}: as it was given, of a file, or of the model's own card."""
        if how.template is None:
            return None if how.card_fields is None else self._card_template(how.card_fields)
        return read_template(how.template)

    def _card_template(self, fields: tuple[str, str]) -> str:
        wanted = " and ".join(f"{{{field}}}" for field in fields)
        remedy = f"pass template=FILE, a text with {{prompt}} and {{response}} in place of {wanted}."
        try:
            card = fetch_file(
                self._model, "README.md", revision=self._revision, token=self._loading["token"]
            ).read_text(encoding="utf-8", errors="replace")
        except CheckpointError as error:
            raise ConfigError(
                f"The prompt format of '{self._model}' is read from its card: {error} Or {remedy}"
            ) from error
        template = template_from_card(card, fields)
        if template is None:
            raise ConfigError(f"The card of '{self._model}' shows no prompt format with {wanted}: {remedy}")
        return template


def _files_sample(folder: Path) -> str:
    files = [(file.name, file.stat()) for file in sorted(folder.iterdir()) if file.is_file()]
    sample = [(name, found.st_size, found.st_mtime_ns) for name, found in files]
    return hashlib.sha256(repr(sample).encode()).hexdigest()
