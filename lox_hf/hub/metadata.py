"""The metadata at the head of a card: what the Hub files a model under, and its results in the Hub's two forms."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, EvalResultEntry, ModelCardData

from lox_hf.errors import CheckpointError, ConfigError
from lox_hf.hub.artefact import Artefact
from lox_hf.hub.evidence import Evidence
from lox_hf.hub_files import fetch_file
from lox_hf.markdown import one_line
from lox_hf.records import AccuracyReport, ModelReference, PerplexityReport, Rate, SafetyReport
from lox_hf.weights.folder import CARD, card_metadata, model_config
from lox_hf.weights.source import ADAPTER_CONFIG, read_json

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]*\w")
LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,60}")
LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z]{2,4})?|code|multilingual")
LINK = re.compile(r"(https://)?[\w./%#?=&+:-]{1,300}")
BENCHMARKS = {
    "advbench": "walledai/AdvBench",
    "harmbench": "walledai/HarmBench",
    "jailbreakbench": "JailbreakBench/JBB-Behaviors",
    "strongreject": "walledai/StrongREJECT",
    "xstest": "Paul/XSTest",
    "gsm8k": "openai/gsm8k",
}
"""Data sets on the Hub by the names under which they are measured."""
RATES = {
    "asr": "Attack success rate",
    "over_refusal": "Over-refusal",
    "degenerate": "Degenerate responses",
}


@dataclass(frozen=True)
class Inherited:
    """What the aligned model's card says that holds for the result too.

    Attributes:
        fields: Metadata by name: licence, language, datasets, pipeline_tag.
        note: Why there is less than there could be, in a sentence; empty where all is well.
    """

    fields: dict[str, Any]
    note: str = ""


def inherit(artefact: Artefact, *, token: str | bool | None = None, offline: bool = False) -> Inherited:
    """Read the aligned model's card.

    Args:
        artefact: What is published.
        token: Hub token; None uses the stored login.
        offline: Look into folders and the Hub's cache only, and send nothing.

    Returns:
        What is taken over.
    """
    name = artefact.aligned.name_or_path
    try:
        folder = _card_folder(artefact.aligned, token, offline)
        found = card_metadata(folder) if folder is not None else {}
    except CheckpointError:
        found, folder = {}, None
    if folder is None:
        where = " in the Hub's cache: its licence and language are looked up at the push" if offline else ""
        said = f"The card of the aligned model '{one_line(name)}' is not to be had{where}."
        return Inherited({}, said)
    return Inherited(_checked(found))


def is_hub_id(name: str | None) -> bool:
    """Whether a name can be looked up on the Hub, and is no folder here."""
    return bool(name and HUB_ID.fullmatch(name) and len(name) <= 96 and not Path(name).exists())


def card_data(
    artefact: Artefact, evidence: Evidence, repo_id: str, inherited: Inherited, license: str | None = None
) -> ModelCardData:
    """Build the metadata of a card.

    Args:
        artefact: What is published.
        evidence: What was measured of it.
        repo_id: The repository.
        inherited: What the aligned model's card says.
        license: The licence that was asked for; it takes the place of the inherited one.

    Returns:
        The metadata.

    Raises:
        ConfigError: If the licence is not an identifier as the Hub knows them.
    """
    fields = dict(inherited.fields)
    if license is not None:
        if not LICENSE.fullmatch(license):
            raise ConfigError(
                f"'{one_line(license)}' is not a licence as the Hub names them, such as apache-2.0, llama2 or other."
            )
        fields = {name: value for name, value in fields.items() if not name.startswith("license")}
        fields["license"] = license
    fields.setdefault("pipeline_tag", _pipeline_tag(artefact))
    results = list(eval_results(evidence))
    return ModelCardData(
        **_lineage(artefact),
        **fields,
        tags=["lox", "safety", "low-rank-extrapolation", *_kind_tags(artefact)],
        model_name=repo_id.rpartition("/")[2] if results else None,
        eval_results=results or None,
        lox=_own_fields(artefact),
    )


def eval_results(evidence: Evidence) -> list[EvalResult]:
    """Results of the hardened model for the `model-index`; shares as they are, between 0 and 1."""
    found = []
    for item in evidence.safety:
        if item.after is not None:
            found += [_safety_result(item.after, field, name) for field, name in RATES.items()]
    for item in evidence.utility:
        if isinstance(item.after, AccuracyReport):
            name = _set_name(item.after.questions)
            extra = {"metric_name": "Accuracy", "metric_args": _interval(item.after.accuracy)}
            found.append(_result(name, "accuracy", item.after.accuracy.share, **extra))
        elif isinstance(item.after, PerplexityReport):
            extra = {"metric_name": "Perplexity", "metric_args": {"tokens": item.after.tokens}}
            found.append(_result(f"texts {item.after.sha256[:12]}", "perplexity", item.after.perplexity, **extra))
    return [result for result in found if result.metric_value == result.metric_value]  # NaN was not measured


def eval_entries(evidence: Evidence) -> list[EvalResultEntry]:
    """Results on data sets of the Hub for `.eval_results`, where each must be named by its id."""
    entries = []
    for result in eval_results(evidence):
        if result.dataset_type in BENCHMARKS.values():
            args = ", ".join(f"{name} {value}" for name, value in (result.metric_args or {}).items())
            notes = f"{result.metric_name}: {args}"
            entries.append(EvalResultEntry(result.dataset_type, result.metric_type, result.metric_value, notes=notes))
    return entries


def _card_folder(model: ModelReference, token: str | bool | None, offline: bool) -> Path | None:
    """Folder with the model's card; None where it has none or the Hub cannot be asked."""
    folder = Path(model.name_or_path).expanduser()
    if folder.is_dir():
        return folder
    if not is_hub_id(model.name_or_path):
        return None
    if offline:
        from huggingface_hub import try_to_load_from_cache

        path = try_to_load_from_cache(model.name_or_path, CARD, revision=model.revision)
        return Path(path).parent if isinstance(path, str) else None
    return fetch_file(model.name_or_path, CARD, revision=model.revision, token=token).parent


def _checked(found: dict[str, Any]) -> dict[str, Any]:
    """Only what has the form it must have: the card is somebody else's text."""
    fields: dict[str, Any] = {}
    if isinstance(found.get("license"), str) and LICENSE.fullmatch(found["license"]):
        fields["license"] = found["license"]
        for name, form in (("license_name", LICENSE), ("license_link", LINK)):
            if isinstance(found.get(name), str) and form.fullmatch(found[name]):
                fields[name] = found[name]
    for name, form in (("language", LANGUAGE), ("datasets", re.compile(r"[\w.-]+(/[\w.-]+)?"))):
        items = found.get(name) if isinstance(found.get(name), list) else [found.get(name)]
        kept = [item for item in items or [] if isinstance(item, str) and form.fullmatch(item)]
        if kept:
            fields[name] = kept
    if isinstance(found.get("pipeline_tag"), str) and re.fullmatch(r"[a-z0-9-]{1,40}", found["pipeline_tag"]):
        fields["pipeline_tag"] = found["pipeline_tag"]
    return fields


def _lineage(artefact: Artefact) -> dict[str, Any]:
    """From which model this one comes. A subspace is no model, and comes from two."""
    if artefact.kind == "subspace":
        return {"library_name": "lox-hf"}
    adapter = artefact.kind != "checkpoint"
    named = {"library_name": "peft" if adapter else "transformers"}
    parent = artefact.carrier if artefact.carrier is not None else artefact.aligned
    if not is_hub_id(parent.name_or_path):
        return named
    return {
        "base_model": parent.name_or_path,
        "base_model_relation": "adapter" if adapter else "finetune",
        **named,
    }


def _kind_tags(artefact: Artefact) -> list[str]:
    return {"checkpoint": [], "subspace": ["lox-subspace"]}.get(artefact.kind, ["lora"])


def _pipeline_tag(artefact: Artefact) -> str | None:
    if artefact.kind == "checkpoint":
        names = model_config(artefact.folder).get("architectures")
        return (
            "text-generation"
            if isinstance(names, list) and any(str(name).endswith("ForCausalLM") for name in names)
            else None
        )
    if artefact.kind == "subspace":
        return None
    return "text-generation" if read_json(artefact.folder / ADAPTER_CONFIG).get("task_type") == "CAUSAL_LM" else None


def _own_fields(artefact: Artefact) -> dict[str, Any]:
    """What was done, for programs."""
    models = {"aligned": artefact.aligned, "base": artefact.base}
    return {
        "kind": artefact.kind,
        "r": "full" if artefact.config.r is None else artefact.config.r,
        "alpha": artefact.config.alpha,
        **{
            side: {"model": one_line(model.name_or_path), "revision": model.revision}
            for side, model in models.items()
            if model is not None
        },
    }


def _safety_result(report: SafetyReport, field: str, name: str) -> EvalResult:
    rate: Rate = getattr(report, field)
    judge = report.over_refusal_judge if field == "over_refusal" else report.judge
    args = {**_interval(rate), "judge": one_line(judge)}
    metric = "attack_success_rate" if field == "asr" else field
    return _result(_set_name(report.prompts), metric, rate.share, metric_name=name, metric_args=args)


def _result(data: str, metric: str, value: float, **extra: Any) -> EvalResult:
    known = BENCHMARKS.get(re.sub(r"[-_ ]", "", data).lower())
    return EvalResult(
        task_type="text-generation",
        # Results are put together by this type, so each set needs one of its own.
        dataset_type=known or re.sub(r"[^\w.-]+", "-", data).strip("-") or "custom",
        dataset_name=data,
        metric_type=metric,
        metric_value=value,
        **extra,
    )


def _interval(rate: Rate) -> dict[str, Any]:
    return {"n": rate.n, "low": rate.low, "high": rate.high}


def _set_name(about: dict[str, Any]) -> str:
    """A prompt set's name; of a file its name alone, as folders say nothing to a reader."""
    name = one_line(str(about.get("name") or ""))
    return (name if is_hub_id(name) else re.split(r"[/\\]", name)[-1]) or "prompts"
