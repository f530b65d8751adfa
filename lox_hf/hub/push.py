"""`push_to_hub`: what LoX made, with its card and what was measured of it, in one commit."""

import re
import tempfile
import warnings
from collections.abc import Collection, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from lox_hf.errors import ConfigError, OutputError
from lox_hf.hub.artefact import Artefact, open_artefact, saved_artefact
from lox_hf.hub.card import PICTURE_NAME, card_warnings, check_repo_id, make_card
from lox_hf.hub.evidence import Evidence, load_evidence
from lox_hf.hub.metadata import eval_entries, inherit
from lox_hf.hub_files import check_token, upload_errors
from lox_hf.records import REPORT_NAME, HardeningReport, PushedFile, PushReport
from lox_hf.weights.folder import CARD

RESULTS_NAME = ".eval_results/lox.yaml"
EVALUATION = "evaluation"
# What an earlier push of ours may have left under other names: weights in other shards, other evaluations.
STALE = re.compile(
    r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json|adapter_(model\.safetensors|config\.json)"
    rf"|lox_subspace\.safetensors|{EVALUATION}/.+|{re.escape(RESULTS_NAME)}|{re.escape(PICTURE_NAME)}"
)
UNMEASURED = (
    "Nothing was measured of this model, and its card says so. Measure it (lox-hf asr) and pass the run's folder as "
    "evaluation (--evaluation)."
)

Content = Path | bytes


def push_to_hub(
    folder_or_model: Any,
    repo_id: str,
    *,
    evaluation: Evidence | str | Path | Iterable[str | Path] | None = None,
    tokenizer: Any = None,
    private: bool = True,
    license: str | None = None,
    token: str | bool | None = None,
    commit_message: str = "Upload a model hardened with LoX",
    dry_run: bool = False,
) -> PushReport:
    """Publish a hardened checkpoint, a LoX adapter or a subspace with its model card, all in one commit.

    The weights go with `lox_config.json`, `lox_report.json`, the reports of what was measured (numbers and hashes, no
    prompt and no answer), the results in the Hub's forms, and a card on which every figure comes from a record.
    Nothing shows in the repository before the commit. An upload that was cut is taken up by pushing again: large
    files that arrived are not sent twice.

    Args:
        folder_or_model: Folder that `harden_checkpoint`, `extract_lox_adapter` or `SafetySubspace.save_pretrained`
            wrote, or to which a hardened model was saved; or a model that was hardened in this process.
        repo_id: Hub id; the repository is made if needed.
        evaluation: Reports of `lox-hf asr`, `utility`, `stress` and `auto` on the aligned and the hardened model:
            files or the runs' folders. A report whose model is the aligned one counts as before.
        tokenizer: The tokenizer of a loaded model, which is saved beside it.
        private: Make the repository private. A repository that is public already is then refused.
        license: Licence as the Hub names it; None takes that of the aligned model's card, where it has one.
        token: Hub token; None uses the stored login.
        commit_message: Message of the commit.
        dry_run: Send nothing, and ask nobody: only say what would be published.

    Returns:
        What was published, with the card.

    Raises:
        CheckpointError: If the folder is nothing that LoX made, a report cannot be read, or the Hub refuses.
        ConfigError: If the id, the licence or the token is none, or two reports contradict each other.
        OutputError: If the repository holds the model that this was made from, or is public and `private` is set.
        LoxError: If the model was not hardened in this process.

    Example:
        >>> from lox_hf import push_to_hub
        >>> report = push_to_hub("hardened", "org/hardened", evaluation=["before", "after"])  # doctest: +SKIP
        >>> report.commit_url  # doctest: +SKIP
        'https://huggingface.co/org/hardened/commit/...'
    """
    check_repo_id(repo_id)
    check_token(token)
    with _opened(folder_or_model, tokenizer) as artefact:
        _check_not_an_input(artefact, repo_id)
        names = [repo_id, str(artefact.folder), *_own_name(folder_or_model)]
        evidence = _evidence(evaluation, artefact, names)
        inherited = inherit(artefact, token=token, offline=dry_run)
        picture = draw_picture(artefact.report)
        card = make_card(
            artefact, evidence, repo_id=repo_id, license=license, inherited=inherited, picture=picture is not None
        )
        contents = _contents(artefact, evidence, str(card), picture)
        said = [
            *card_warnings(artefact, evidence, inherited),
            *_pusher_warnings(artefact, evidence, card.data.get("license")),
        ]
        if artefact.report is not None and picture is None:
            said.append("Without matplotlib the card has no picture of the energy (lox-hf[plot]).")
        for line in said:
            warnings.warn(line, stacklevel=2)
        url, removed = "", ()
        if not dry_run:
            url, removed, private = _publish(contents, repo_id, private, token, commit_message)
        files = [PushedFile(path, _size(content)) for path, content in contents.items()]
    return PushReport(
        repo_id, artefact.kind, private, url, tuple(files), artefact.left_out, removed, tuple(said), str(card)
    )


def draw_picture(report: HardeningReport | None) -> bytes | None:
    """Draw the energy of every matrix as a PNG file.

    Args:
        report: What was done.

    Returns:
        The file; None without a report or without matplotlib.
    """
    from lox_hf.plots.energy import draw_energy
    from lox_hf.plots.style import save_figure

    if report is None:
        return None
    try:
        figure = draw_energy(report)
    except ConfigError:  # no matplotlib
        return None
    with tempfile.TemporaryDirectory() as folder:
        return save_figure(figure, Path(folder) / "energy")[0].read_bytes()


def evidence_files(evidence: Evidence) -> dict[str, bytes]:
    """Files with what was measured: records as they were read, so that nothing else of the files is published.

    Args:
        evidence: What was measured.

    Returns:
        Contents by path in the repository.
    """
    files: dict[str, Any] = {}
    for number, item in enumerate(evidence.safety, start=1):
        report = item.after or item.before
        name = _slug(str(report.prompts.get("name") or "prompts") if report else "comparison")
        folder = (
            f"{EVALUATION}/{name}"
            if f"{EVALUATION}/{name}/" not in "".join(files)
            else f"{EVALUATION}/{name}-{number}"
        )
        sides = {"before": item.before, "after": item.after, "comparison": item.comparison}
        files |= {f"{folder}/{side}.json": found for side, found in sides.items() if found is not None}
    for number, item in enumerate(evidence.utility, start=1):
        kind = type(item.after or item.before).__name__.removesuffix("Report").lower()
        sides = {"before": item.before, "after": item.after}
        files |= {
            f"{EVALUATION}/utility-{number}-{kind}/{side}.json": found
            for side, found in sides.items()
            if found is not None
        }
    if evidence.stress is not None:
        files[f"{EVALUATION}/stress.json"] = evidence.stress
    if evidence.auto is not None:
        files[f"{EVALUATION}/auto.json"] = evidence.auto
    return {path: record.to_json().encode() for path, record in files.items()}


def refuse_public(repo_id: str, private: bool | None) -> None:
    """Refuse a repository that others can read, where it should be private.

    Args:
        repo_id: The repository, which exists.
        private: Whether it is private.

    Raises:
        OutputError: If it is not.
    """
    if not private:
        raise OutputError(
            f"'{repo_id}' exists and is public: pass private=False (--public) to publish there, or make it private "
            "on its Hub page first."
        )


def stale_files(there: Collection[str], contents: Collection[str]) -> tuple[str, ...]:
    """Find what an earlier push of ours left that is not of the new model.

    Args:
        there: Files of the repository.
        contents: Files that come.

    Returns:
        Files to take away.
    """
    ours = REPORT_NAME in there
    return tuple(sorted(name for name in there if ours and STALE.fullmatch(name) and name not in contents))


def _opened(folder_or_model: Any, tokenizer: Any) -> AbstractContextManager[Artefact]:
    if not isinstance(folder_or_model, str | Path):
        return saved_artefact(folder_or_model, tokenizer)
    if tokenizer is not None:
        raise ConfigError("A tokenizer is passed with a loaded model only: save it into the folder.")
    return nullcontext(open_artefact(folder_or_model))


def _own_name(folder_or_model: Any) -> list[str]:
    if isinstance(folder_or_model, str | Path):
        return [str(folder_or_model)]
    return [str(name)] if (name := getattr(folder_or_model, "name_or_path", "")) else []


def _check_not_an_input(artefact: Artefact, repo_id: str) -> None:
    for role, model in (("aligned model", artefact.aligned), ("base", artefact.base), ("base", artefact.carrier)):
        if model is not None and model.name_or_path.lower() == repo_id.lower():
            raise OutputError(
                f"'{repo_id}' is the {role} that this was made from, and would be overwritten: choose another name, "
                f"such as '{repo_id}-lox'."
            )


def _evidence(evaluation: Any, artefact: Artefact, names: list[str]) -> Evidence:
    if evaluation is None:
        return Evidence()
    if isinstance(evaluation, Evidence):
        return evaluation
    paths = [evaluation] if isinstance(evaluation, str | Path) else evaluation
    return load_evidence(paths, aligned=artefact.aligned, hardened=names)


def _pusher_warnings(artefact: Artefact, evidence: Evidence, license: str | None) -> list[str]:
    """What the card says in its own place."""
    lines = [UNMEASURED] * (not evidence.measured and artefact.kind != "subspace")
    if artefact.report is None:
        lines.append(
            f"There is no {REPORT_NAME}, so the card does not say how much of the change was used: harden with "
            "lox-hf, or push the loaded model itself."
        )
    return lines + ["No licence is known: pass license (--license)."] * (not license)


def _contents(artefact: Artefact, evidence: Evidence, card: str, picture: bytes | None) -> dict[str, Content]:
    contents: dict[str, Content] = {name: artefact.folder / name for name in artefact.files}
    contents[CARD] = card.encode()
    if picture is not None:
        contents[PICTURE_NAME] = picture
    contents |= evidence_files(evidence)
    if entries := eval_entries(evidence):
        import yaml
        from huggingface_hub import eval_result_entries_to_yaml

        contents[RESULTS_NAME] = yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False).encode()
    return dict(sorted(contents.items()))


def _publish(
    contents: Mapping[str, Content], repo_id: str, private: bool, token: str | bool | None, message: str
) -> tuple[str, tuple[str, ...], bool]:
    """Upload what the Hub has not, and commit all at once: its URL, what it took away, whether it is private there."""
    import huggingface_hub
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    with upload_errors(repo_id):
        api = huggingface_hub.HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        found = api.model_info(repo_id)
    if private:
        refuse_public(repo_id, found.private)
    removed = stale_files({file.rfilename for file in found.siblings or []}, contents)
    with upload_errors(repo_id):
        operations = [CommitOperationDelete(name) for name in removed]
        commit = api.create_commit(
            repo_id,
            [*operations, *(CommitOperationAdd(path, content) for path, content in contents.items())],
            commit_message=message,
            parent_commit=found.sha,
        )
    return str(commit.commit_url), removed, bool(found.private)


def _size(content: Content) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def _slug(name: str) -> str:
    last = re.split(r"[/\\]", name)[-1]
    return re.sub(r"[^A-Za-z0-9.]+", "-", last).strip("-.")[:60] or "prompts"
