"""The run: prompts are answered, answers are judged, and everything is on disk as soon as it is there."""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lox_hf.evaluation.answering import answer, as_chat_model
from lox_hf.evaluation.asr import judge_responses, summarise
from lox_hf.evaluation.comparison import agreement
from lox_hf.evaluation.data.prompts import Prompt, check_number, load_prompts, set_hash
from lox_hf.evaluation.judges import Judge, JudgeLike, get_judge
from lox_hf.evaluation.models.chat import ChatModel, Reply, ask
from lox_hf.evaluation.report import render_markdown
from lox_hf.evaluation.run_folder import RunFolder
from lox_hf.progress import progress_bar
from lox_hf.records import JudgeAgreement, ModelReference, SafetyReport, Verdict

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
    template: str = "auto",
    max_new_tokens: int = 60,
    batch_size: int | None = None,
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
        template: "chat" (the tokenizer's), "alpaca" (the reference's), "none", or "auto": chat where there is one.
        max_new_tokens: Longest answer in tokens; the paper's 60.
        batch_size: Prompts at once; None finds what fits.
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
    chat = as_chat_model(model, tokenizer, template=template, max_new_tokens=max_new_tokens, batch_size=batch_size)
    reports, _ = run_judges(
        chat,
        _load(prompts, n, column),
        [get_judge(judge)],
        output_dir=output_dir,
        set_name=str(prompts) if isinstance(prompts, (str, Path)) else "",
        system_prompt=system_prompt,
        progressbar=progressbar,
    )
    return reports[0]


def run_judges(
    chat: ChatModel,
    prompts: Sequence[Prompt],
    judges: Sequence[Judge],
    *,
    output_dir: str | Path | None = None,
    set_name: str = "",
    system_prompt: str | None = None,
    progressbar: bool | None = None,
) -> tuple[list[SafetyReport], list[JudgeAgreement]]:
    """Answer prompts once and have every judge judge the answers; see `evaluate_safety`.

    Args:
        chat: What answers.
        prompts: The prompts.
        judges: The judges; the first one's report becomes `report.json`.
        output_dir: Folder of the run; None keeps everything in memory.
        set_name: Name of the prompt set, for the reports.
        system_prompt: A system turn before every prompt; None sends none.
        progressbar: Show progress bars; None shows them on a terminal only.

    Returns:
        A report for every judge, and the agreement of the first with each of the others.

    Raises:
        OutputError: If the folder holds another run, or cannot be written.
        EndpointError: If an endpoint cannot be used; what was answered and judged is kept.
    """
    generation = {**chat.settings(), "system_prompt": system_prompt}
    settings = {"model": chat.name, "prompts": set_hash(prompts), **generation}
    with RunFolder(output_dir, settings) as run:
        conversations = [ask(prompt.text, system_prompt) for prompt in prompts]
        replies = answer(run, chat, conversations, list(map(_about, prompts)), progressbar)
        model = ModelReference(chat.name, generation.pop("revision", None))
        generation.pop("weights_sample", None)  # it tells runs apart, and says nothing to a reader
        reports = []
        for judge in judges:
            verdicts = _judge(run, judge, prompts, replies, progressbar)
            texts = [reply.text for reply in replies]
            reports.append(
                summarise(prompts, texts, verdicts, judge, set_name=set_name, model=model, generation=generation)
            )
        agreements = [agreement(reports[0], report) for report in reports[1:]]
        for number, (judge, report) in enumerate(zip(judges, reports, strict=True)):
            run.write(f"report.{_slug(judge)}.json" if number else SAFETY_REPORT_NAME, report.to_json())
        run.write("report.md", render_markdown(reports, agreements))
    return reports, agreements


def _load(prompts: str | Path | Sequence[str | Prompt], n: int | None, column: str | None) -> list[Prompt]:
    """Return the prompts that are meant: of a set or a file, or as they are given."""
    if isinstance(prompts, (str, Path)):
        return load_prompts(prompts, n=n, column=column)
    check_number(n)
    return [prompt if isinstance(prompt, Prompt) else Prompt(prompt) for prompt in prompts[:n]]


def _about(prompt: Prompt) -> dict[str, Any]:
    """What stands beside an answer on disk."""
    return {"prompt": prompt.text, "harmful": prompt.harmful, "category": prompt.category}


def _judge(
    run: RunFolder, judge: Judge, prompts: Sequence[Prompt], replies: Sequence[Reply], progressbar: bool | None
) -> list[Verdict]:
    """Verdicts in the order of the prompts, those of an earlier process among them."""
    journal = run.journal(f"verdicts.{_slug(judge)}.jsonl")
    verdicts = {
        position: Verdict("unscored", f"no response: {reply.error}")
        for position, reply in enumerate(replies)
        if reply.error
    }
    verdicts |= {position: Verdict.from_dict(item) for position, item in journal.items.items()}
    with progress_bar(
        len(prompts), progressbar, f"Judging by {judge.name}", unit="response", done=len(verdicts)
    ) as advance:
        texts = [reply.text for reply in replies]
        for position, verdict in judge_responses(judge, prompts, texts, done=verdicts):
            advance(1)
            verdicts[position] = verdict
            if not verdict.transient:
                journal.add(position, verdict.to_dict())
    return [verdicts[position] for position in range(len(prompts))]


def _slug(judge: Judge) -> str:
    """The judge in a file name: its name, and a hash of what else its verdicts depend on."""
    settings = json.dumps(judge.settings(), sort_keys=True)
    name = re.sub(r"[^A-Za-z0-9.]+", "-", judge.name).strip("-.")
    return f"{name}-{hashlib.sha256((judge.name + settings).encode()).hexdigest()[:8]}"
