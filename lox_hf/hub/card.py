"""The model card: the template filled with what an artefact says of itself and what was measured of it."""

import math
import re
import shlex
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from lox_hf.errors import ConfigError
from lox_hf.hub import sections
from lox_hf.hub.artefact import Artefact
from lox_hf.hub.evidence import Evidence
from lox_hf.hub.metadata import HUB_ID, Inherited, card_data, inherit, is_hub_id
from lox_hf.markdown import escape, one_line
from lox_hf.records import ModelReference
from lox_hf.version import __version__
from lox_hf.weights.folder import model_config

TEMPLATE = Path(__file__).with_name("template.md")
PICTURE_NAME = "energy.png"
TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
LOX = "Low-Rank Extrapolation (LoX, [Perin et al., COLM 2025](https://arxiv.org/abs/2506.15606))"
SUMMARIES = {
    "checkpoint": f"{{aligned}} with its alignment hardened against fine-tuning by {LOX}.",
    "adapter": f"A LoRA adapter that hardens the alignment of {{aligned}} against fine-tuning by {LOX}.",
    "hardened adapter": f"The alignment adapter {{aligned}}, hardened against fine-tuning by {LOX}.",
    "subspace": f"The directions along which alignment moved the weights of {{aligned}}, for {LOX}.",
}
COMMANDS = {"checkpoint": "harden", "hardened adapter": "harden", "adapter": "adapter", "subspace": "subspace"}


def make_card(
    artefact: Artefact,
    evidence: Evidence | None = None,
    *,
    repo_id: str,
    license: str | None = None,
    inherited: Inherited | None = None,
    picture: bool = False,
    token: str | bool | None = None,
) -> ModelCard:
    """Write the model card of something that LoX made.

    Every figure on it is read from a record; what was not measured reads "not evaluated". Texts of others (names of
    models, judges and prompt sets) are escaped.

    Args:
        artefact: What is published.
        evidence: What was measured of it; None says on the card that nothing was.
        repo_id: The repository that it is for.
        license: Licence as the Hub names it; None takes that of the aligned model's card, where it has one.
        inherited: What the aligned model's card says; None reads it.
        picture: Whether `energy.png` lies beside the card.
        token: Hub token for the aligned model's card; None uses the stored login.

    Returns:
        The card, which `huggingface_hub` can save, validate and push.

    Raises:
        ConfigError: If the repository's id or the licence is none.

    Example:
        >>> from lox_hf.hub.artefact import open_artefact
        >>> print(make_card(open_artefact("hardened"), repo_id="org/hardened"))  # doctest: +SKIP

    Source: Mitchell et al., "Model Cards for Model Reporting", 2019; the Hub's card format.
    """
    check_repo_id(repo_id)
    evidence = evidence or Evidence()
    inherited = inherit(artefact, token=token) if inherited is None else inherited
    data = card_data(artefact, evidence, repo_id, inherited, license)
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        title=repo_id.rpartition("/")[2],
        repo_id=repo_id,
        kind=artefact.kind,
        summary=SUMMARIES[artefact.kind].format(aligned=_linked(artefact.aligned)),
        notes=sections.warnings(card_warnings(artefact, evidence, inherited)),
        measured=evidence.measured or artefact.kind == "subspace",
        changes=sections.changes(artefact),
        energy=sections.energy(artefact.report),
        picture=PICTURE_NAME if picture else "",
        safety=sections.safety(evidence),
        utility=sections.utility(evidence),
        stress=(sections.short_attack(evidence.auto) if evidence.stress is None else "")
        or sections.stress(evidence.stress),
        licence=_licence(data.license, license),
        commands=_commands(artefact, repo_id),
        version=__version__,
        **_code(artefact, repo_id),
    )
    # Parts of the template that do not apply leave empty lines behind.
    return ModelCard(re.sub(r"\n{3,}", "\n\n", card.content).rstrip() + "\n")


def card_warnings(artefact: Artefact, evidence: Evidence, inherited: Inherited) -> tuple[str, ...]:
    """What a reader of the card should know, and whoever pushes it.

    Args:
        artefact: What is published.
        evidence: What was measured of it.
        inherited: What the aligned model's card says.

    Returns:
        Sentences.
    """
    lines = []
    if artefact.report is not None:
        lines += artefact.report.warnings
    for side, model in (("aligned model", artefact.aligned), ("base", artefact.base)):
        if model is not None and not is_hub_id(model.name_or_path):
            lines.append(
                f"The {side} is '{one_line(model.name_or_path)}', which is not on the Hub, so no reader can check "
                "these weights against it."
            )
        elif model is not None and not model.revision:
            lines.append(f"At which commit the {side} '{model.name_or_path}' was read is not known.")
    if artefact.config.alpha < 0:
        lines.append("alpha is negative: alignment was taken away, and this model is less safe than the aligned one.")
    lines += [inherited.note] * bool(inherited.note)
    lines += evidence.warnings
    if evidence.stress is not None and not _is_in(evidence.stress.before, artefact):
        lines.append("The stress test has no hardened model with this r and alpha.")
    return tuple(lines)


def check_repo_id(repo_id: str) -> None:
    """Refuse an id that names no repository of somebody's.

    Raises:
        ConfigError: If it does not read "owner/name".
    """
    if not HUB_ID.fullmatch(repo_id) or len(repo_id) > 96 or ".." in repo_id or "--" in repo_id:
        raise ConfigError(f"'{one_line(repo_id)}' is not a Hub id with its owner, such as 'org/model-lox'.")


def _is_in(models: Any, artefact: Artefact) -> bool:
    settings = (artefact.config.r, artefact.config.alpha)
    names = [re.fullmatch(r"hardened r=(\S+) alpha=(\S+).*", item.model) for item in models]
    return any((_number(found[1]), _number(found[2])) == settings for found in names if found)


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:  # "full"
        return None


def _linked(model: ModelReference) -> str:
    name = model.name_or_path
    return f"[{escape(name)}](https://huggingface.co/{name})" if is_hub_id(name) else f"“{escape(Path(name).name)}”"


def _code(artefact: Artefact, repo_id: str) -> dict[str, Any]:
    """Names in the code of the card, as Python writes them."""
    carrier = artefact.carrier or artefact.aligned
    has_tokenizer = any(name in TOKENIZER_FILES for name in artefact.files)
    tokenizer = f'"{repo_id}"' if has_tokenizer else _argument(carrier)
    r = artefact.config.r
    directions = f'SafetySubspace.from_pretrained("{repo_id}")'
    if artefact.kind != "subspace":
        models = (artefact.aligned, artefact.base)
        aligned, base = (_python(one_line(model.name_or_path)) if model else "" for model in models)
        rank = "" if r is None or math.isclose(r, 6) else f", LoxConfig(r={r})"
        directions = f"SafetySubspace.from_models({aligned}, {base}{rank})" if base else ""
    return {
        "carrier": _argument(carrier),
        "aligned": _argument(artefact.aligned),
        "tokenizer": tokenizer,
        "r": r,
        "alpha": artefact.config.alpha,
        "directions": directions,
        "tied": bool(model_config(artefact.folder).get("tie_word_embeddings")),
    }


def _argument(model: ModelReference) -> str:
    name = _python(one_line(model.name_or_path))
    return f'{name}, revision="{model.revision}"' if _is_commit(model.revision) else name


def _python(text: str) -> str:
    """A text as a Python literal in double quotes."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _is_commit(revision: str | None) -> bool:
    return bool(re.fullmatch(r"[\w./-]{1,200}", revision or ""))


def _commands(artefact: Artefact, repo_id: str) -> str:
    """The command that gives this again, by name and commit of both models."""
    words = ["lox-hf", COMMANDS[artefact.kind], one_line(artefact.aligned.name_or_path)]
    if _is_commit(artefact.aligned.revision):
        words += ["--model-revision", str(artefact.aligned.revision)]
    if artefact.base is not None:
        words += ["--base-model", one_line(artefact.base.name_or_path)]
        if _is_commit(artefact.base.revision):
            words += ["--base-revision", str(artefact.base.revision)]
    words += ["--config", "lox_config.json", "--output", "again"]
    download = ["hf", "download", repo_id, "lox_config.json", "--local-dir", "."]
    return f"{shlex.join(download)}\n{shlex.join(words)}"


def _licence(license: str | None, asked: str | None) -> str:
    if not license:
        return "Licence: not stated; the aligned model's terms hold for what is made of it."
    source = "as whoever published this chose" if asked else "as on the aligned model's card"
    return f"Licence: `{license}`, {source}."
