"""The run: prompts are answered, answers are judged, and everything is on disk as soon as it is there."""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lox_hf.evaluation.answering import answer, as_chat_model
from lox_hf.evaluation.asr import as_prompts, judge_responses, over_refusal_judge, summarise
from lox_hf.evaluation.comparison import agreement, check_comparable, compare
from lox_hf.evaluation.data.prompts import Prompt, check_number, load_prompts, set_hash
from lox_hf.evaluation.judges import Judge, JudgeLike, get_judge
from lox_hf.evaluation.models.chat import ChatModel, Reply, ask
from lox_hf.evaluation.report import render_markdown
from lox_hf.progress import progress_bar
from lox_hf.records import ModelReference, SafetyReport, SafetyRun, Verdict
from lox_hf.run_folder import RunFolder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SAFETY_REPORT_NAME = "report.json"


def evaluate_safety(
    model: "PreTrainedModel | ChatModel",
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    prompts: str | Path | Sequence[str | Prompt] = "advbench",
    judge: JudgeLike = "refusal",
    *,
    output_dir: str | Path | None = None,
    n: int | None = None,
    column: str | None = None,
    template: str | None = None,
    max_new_tokens: int | None = None,
    batch_size: int | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
    system_prompt: str | None = None,
    progressbar: bool | None = None,
) -> SafetyReport:
    """Let a model answer prompts greedily, judge the answers, and return the attack success rate with its interval.

    With `output_dir` every answer and every verdict is on disk as soon as it is there: a killed run goes on where it
    was, and another judge needs no new answers. The model and the tokenizer are left as they were found.

    Args:
        model: A loaded model, or a `ChatModel` such as an `Endpoint`.
        tokenizer: The model's tokenizer; None for a `ChatModel`.
        prompts: Name of a set ("advbench", "jailbreakbench", "harmbench", "strongreject", "xstest"), a file, or the
            prompts themselves: texts, which are taken as harmful, or `Prompt`s.
        judge: A judge, its name, or a function, as `attack_success_rate` takes it.
        output_dir: Folder for `generations.jsonl`, `verdicts.*.jsonl`, `report.json` and `report.md`; None keeps
            everything in memory.
        n: Take the first n prompts only; None takes all.
        column: Column of the prompts in a file where it cannot be told by its name.
        template: "chat" (the tokenizer's), "alpaca" (the reference's) or "none"; None takes chat where there is one,
            else alpaca. This and the next three are a loaded model's; a `ChatModel` has its own.
        max_new_tokens: Longest answer in tokens; None takes the paper's 60.
        batch_size: Prompts at once; None finds what fits.
        chat_template_kwargs: Further variables of the chat template, such as {"enable_thinking": False}.
        system_prompt: A system turn before every prompt; None sends none.
        progressbar: Show progress bars; None shows them on a terminal only.

    Returns:
        The report.

    Raises:
        ConfigError: If settings contradict each other, or the judge is not known.
        PromptError: If the prompts cannot be read.
        OutputError: If the folder holds another run, or cannot be written.
        EndpointError: If an endpoint cannot be used; what was answered is kept.
        UnsupportedModelError: If the model cannot generate from a prompt, such as an encoder-decoder.

    Example:
        >>> report = evaluate_safety(model, tokenizer, "advbench", n=100)  # doctest: +SKIP
        >>> print(report.asr)  # doctest: +SKIP
        11.0 % [6.3, 18.6] of 100

    Source: Perin et al., COLM 2025, section 4; the reference's safety/ASR.py.
    """
    chat = as_chat_model(
        model,
        tokenizer,
        template=template,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        chat_template_kwargs=chat_template_kwargs,
    )
    run = run_judges(
        chat,
        _load(prompts, n, column),
        [get_judge(judge)],
        output_dir=output_dir,
        set_name=str(prompts) if isinstance(prompts, (str, Path)) else "",
        system_prompt=system_prompt,
        progressbar=progressbar,
    )
    return run.reports[0]


def run_judges(
    chat: ChatModel,
    prompts: Sequence[Prompt],
    judges: Sequence[Judge],
    *,
    output_dir: str | Path | None = None,
    set_name: str = "",
    system_prompt: str | None = None,
    compare_with: SafetyReport | None = None,
    progressbar: bool | None = None,
) -> SafetyRun:
    """Answer prompts once and have every judge judge the answers; see `evaluate_safety`.

    Args:
        chat: What answers.
        prompts: The prompts.
        judges: The judges; the first one's report becomes `report.json`.
        output_dir: Folder of the run; None keeps everything in memory.
        set_name: Name of the prompt set, for the reports.
        system_prompt: A system turn before every prompt; None sends none.
        compare_with: Report of an earlier run by the first judge.
        progressbar: Show progress bars; None shows them on a terminal only.

    Returns:
        A report for every judge, their agreement with the first, and the comparison.

    Raises:
        ConfigError: If the earlier report cannot be compared with: another judge, or other prompts.
        OutputError: If the folder holds another run, or cannot be written.
        EndpointError: If an endpoint cannot be used; what was answered and judged is kept.

    Example:
        >>> from lox_hf import ClassifierJudge, Endpoint, RefusalJudge, load_prompts
        >>> chat, judges = Endpoint("org/model"), [RefusalJudge(), ClassifierJudge("org/guard")]  # doctest: +SKIP
        >>> print(run_judges(chat, load_prompts("xstest"), judges).agreements[0].kappa)  # doctest: +SKIP
        0.81
    """
    if compare_with is not None:
        check_comparable(compare_with, judges[0], prompts)
    generation = {**chat.settings(), "system_prompt": system_prompt}
    settings = {"prompts": f"{len(prompts)}, sha256 {set_hash(prompts)[:16]}", **generation}
    if "weights_sample" not in generation:  # else the weights say which model it is, wherever it lies
        settings["model"] = chat.name
    with RunFolder(output_dir, settings) as folder:
        conversations = [ask(prompt.text, system_prompt) for prompt in prompts]
        replies = answer(folder, chat, conversations, list(map(_about, prompts)), progressbar)
        model = ModelReference(chat.name, generation.pop("revision", None))
        generation.pop("weights_sample", None)  # it tells runs apart, and says nothing to a reader
        texts = [None if reply.error else reply.text for reply in replies]
        reports: list[SafetyReport] = []
        for judge in judges:
            verdicts = _judge(folder, judge, prompts, replies, progressbar)
            report = summarise(prompts, texts, verdicts, judge, set_name=set_name, model=model, generation=generation)
            # At once: the next judge may fail.
            folder.write(f"report.{_slug(judge)}.json" if reports else SAFETY_REPORT_NAME, report.to_json())
            reports.append(report)
        agreements = tuple(agreement(reports[0], report) for report in reports[1:])
        run = SafetyRun(tuple(reports), agreements, compare(compare_with, reports[0]) if compare_with else None)
        _write(folder, judges, run)
    return run


def _write(folder: RunFolder, judges: Sequence[Judge], run: SafetyRun) -> None:
    """What is said of several reports, and a page to read."""
    for number, found in enumerate(run.agreements, start=1):
        folder.write(f"agreement.{_slug(judges[number])}.json", found.to_json())
    if run.comparison is not None:
        folder.write("comparison.json", run.comparison.to_json())
    folder.write("report.md", render_markdown(run))


def _load(prompts: str | Path | Sequence[str | Prompt], n: int | None, column: str | None) -> list[Prompt]:
    """Return the prompts that are meant: of a set or a file, or as they are given."""
    if isinstance(prompts, (str, Path)):
        return load_prompts(prompts, n=n, column=column)
    check_number(n)
    return as_prompts(prompts)[:n]


def _about(prompt: Prompt) -> dict[str, Any]:
    """What stands beside an answer on disk."""
    return {"prompt": prompt.text, "harmful": prompt.harmful, "category": prompt.category}


def _judge(
    folder: RunFolder, judge: Judge, prompts: Sequence[Prompt], replies: Sequence[Reply], progressbar: bool | None
) -> list[Verdict]:
    """Verdicts in the order of the prompts, those of an earlier process among them."""
    journal = folder.journal(f"verdicts.{_slug(judge)}.jsonl", fresh=not judge.durable)
    known = {position: Verdict.from_dict(item) for position, item in journal.items.items()}
    known |= {
        position: Verdict("unscored", f"no response: {reply.error}", transient=True)
        for position, reply in enumerate(replies)
        if reply.error
    }
    harmless = journal
    if over_refusal_judge(judge) is not judge and not all(prompt.harmful for prompt in prompts):
        # By phrases, which are never taken from the disk.
        harmless = folder.journal(f"verdicts.{_slug(judge)}.harmless.jsonl", fresh=True)
    texts = [None if reply.error else reply.text for reply in replies]
    verdicts = {}
    with progress_bar(len(prompts), progressbar, f"Judging by {judge.name}", unit="response") as advance:
        for position, verdict in judge_responses(judge, prompts, texts, known):
            advance(1)
            verdicts[position] = verdict
            if not verdict.transient:
                (journal if prompts[position].harmful else harmless).add(position, verdict.to_dict())
    return [verdicts[position] for position in range(len(prompts))]


def _slug(judge: Judge) -> str:
    """The judge in a file name: its name, and a hash of what else its verdicts depend on."""
    settings = json.dumps(judge.settings(), sort_keys=True)
    name = re.sub(r"[^A-Za-z0-9.]+", "-", judge.name).strip("-.")
    return f"{name}-{hashlib.sha256((judge.name + settings).encode()).hexdigest()[:8]}"
