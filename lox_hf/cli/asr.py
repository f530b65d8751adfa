"""`lox-hf asr`: attack success rate of a model, with intervals."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lox_hf.cli.config_file import merge_file, refuse_without
from lox_hf.cli.options import add_loading_options, add_model_options, default_output, load_for_running
from lox_hf.errors import CheckpointError, ConfigError
from lox_hf.evaluation.models.templates import TEMPLATES

if TYPE_CHECKING:
    from lox_hf.evaluation.data.prompts import Prompt
    from lox_hf.evaluation.judges import Judge
    from lox_hf.evaluation.models.chat import ChatModel
    from lox_hf.records import SafetyReport

DESCRIPTION = """Let a model answer harmful prompts greedily, judge the answers, and print the attack success rate with
its 95 % interval; prompts that are labelled safe give over-refusal. A killed run goes on where it was. Keys are read
from the environment (OPENAI_API_KEY for OpenAI) and are never stored."""
LOADED_ONLY = ("template", "dtype", "device", "batch_size", "model_revision", "trust_remote_code")
"""What is the server's business where the model is at an endpoint."""


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = commands.add_parser("asr", help="measure the attack success rate of a model", description=DESCRIPTION)
    add_model_options(parser, model="the model", output="folder of the run (default: named after model and prompts)")
    parser.add_argument(
        "--prompts",
        metavar="FILE|NAME",
        help="CSV, JSON, JSONL, text or Parquet file, or advbench, jailbreakbench, harmbench, strongreject, xstest",
    )
    parser.add_argument("--column", metavar="NAME", help="column of the prompts (default: found by its name)")
    parser.add_argument("--n", type=int, metavar="N", help="the first N prompts only (default: all)")
    parser.add_argument(
        "--judge",
        nargs="+",
        metavar="JUDGE",
        help="refusal, classifier:ID, rubric:MODEL; several give their agreement (default: refusal)",
    )
    parser.add_argument("--judge-endpoint", metavar="URL", help="OpenAI-compatible endpoint of the rubric's judge")
    parser.add_argument(
        "--judge-key-env", metavar="NAME", help="environment variable with the key of --judge-endpoint"
    )
    parser.add_argument("--rubric", metavar="FILE", help="the rubric's prompt, with {prompt} and {response} in it")
    parser.add_argument("--endpoint", metavar="URL", help="MODEL is served there, OpenAI-compatible, and not loaded")
    parser.add_argument("--key-env", metavar="NAME", help="environment variable with the key of --endpoint")
    parser.add_argument(
        "--template", choices=TEMPLATES, help="how a prompt is put (default: auto: chat where the model has one)"
    )
    parser.add_argument("--system-prompt", metavar="TEXT", help="a system turn before every prompt")
    parser.add_argument(
        "--chat-template-kwargs",
        type=_json_object,
        metavar="JSON",
        help="variables of the chat template, such as '{\"enable_thinking\": false}'",
    )
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="longest answer (default: 60, as the paper)")
    add_loading_options(parser)
    parser.add_argument("--compare", metavar="DIR", help="an earlier run to compare with, such as the aligned model's")
    parser.set_defaults(func=run)


def run(options: argparse.Namespace) -> None:
    """Measure, and print the report."""
    options = merge_file(options)
    if not options.prompts:
        raise ConfigError("No prompts are named: pass --prompts with a file or a name such as advbench.")
    refuse_without(options, "endpoint", ["key_env"])
    refuse_without(options, "not endpoint", LOADED_ONLY)
    from lox_hf.evaluation.data.prompts import load_prompts
    from lox_hf.evaluation.report import render_screen
    from lox_hf.evaluation.safety import run_judges
    from lox_hf.run_folder import RunFolder

    folder = default_output(options.model, f"asr-{Path(options.prompts).stem}")
    output = Path(options.output) if options.output else folder
    RunFolder(output, {}).check()  # before the model is loaded, and not only after it
    judges = _judges(options)
    prompts = load_prompts(options.prompts, column=options.column, n=options.n)
    earlier = _earlier_report(options.compare, judges[0], prompts) if options.compare else None
    chat = _chat_model(options)
    if not options.json:
        print(_about(options, chat, prompts, output) + "\n", flush=True)
    found = run_judges(
        chat,
        prompts,
        judges,
        output_dir=output,
        set_name=str(options.prompts),
        system_prompt=options.system_prompt,
        compare_with=earlier,
        progressbar=False if options.json else None,
    )
    if options.json:
        only_one = len(found.reports) == 1 and found.comparison is None
        print((found.reports[0] if only_one else found).to_json(), end="")
        return
    print(render_screen(found))
    print(f"Written to {output}: report.md, report.json, every answer and every verdict.")


def _judges(options: argparse.Namespace) -> "list[Judge]":
    from lox_hf.evaluation.judges import get_judge

    names = options.judge or ["refusal"]
    rubrics = [name for name in names if name.startswith("rubric:") and name != "rubric:"]
    if not rubrics and (options.judge_endpoint or options.judge_key_env or options.rubric):
        raise ConfigError(
            "--judge-endpoint, --judge-key-env and --rubric belong to a judge 'rubric:MODEL': name one with --judge."
        )
    return [_rubric_judge(name, options) if name in rubrics else get_judge(name) for name in names]


def _rubric_judge(name: str, options: argparse.Namespace) -> "Judge":
    """A model at an endpoint, or in a folder of this machine."""
    from lox_hf.evaluation.judges import is_folder
    from lox_hf.evaluation.judges.rubric import RubricJudge

    model = name.removeprefix("rubric:")
    if is_folder(model) and not options.judge_endpoint:
        from lox_hf.evaluation.models.loading import load_model

        return RubricJudge.from_model(*load_model(model), template=options.rubric)
    return RubricJudge.from_endpoint(
        model, base_url=options.judge_endpoint, api_key_env=options.judge_key_env, template=options.rubric
    )


def _chat_model(options: argparse.Namespace) -> "ChatModel":
    tokens = 60 if options.max_new_tokens is None else options.max_new_tokens
    if options.endpoint:
        from lox_hf.evaluation.models.endpoint import Endpoint

        variables = options.chat_template_kwargs  # vLLM and others read them from the request
        return Endpoint(
            options.model,
            base_url=options.endpoint,
            api_key_env=options.key_env,
            max_new_tokens=tokens,
            extra_body={"chat_template_kwargs": variables} if variables else None,
        )
    from lox_hf.evaluation.models.local import LocalModel

    model, tokenizer = load_for_running(options)
    return LocalModel(
        model,
        tokenizer,
        template=options.template or "auto",
        max_new_tokens=tokens,
        batch_size=options.batch_size,
        chat_template_kwargs=options.chat_template_kwargs,
    )


def _json_object(text: str) -> dict[str, Any]:
    """Parse an object as JSON writes it."""
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError):
        raise argparse.ArgumentTypeError(f"expected a JSON object, got {text!r}") from None


def _about(options: argparse.Namespace, chat: "ChatModel", prompts: "list[Prompt]", output: Path) -> str:
    """Lines that say what is about to be measured, and what an earlier process has left."""
    harmful = sum(prompt.harmful for prompt in prompts)
    kinds = f"{harmful} harmful, {len(prompts) - harmful} harmless"
    if harmful == len(prompts):
        kinds = f"{harmful}, all taken as harmful: no label says otherwise"
    answers = output / "generations.jsonl"
    there = answers.read_bytes().count(b"\n") if answers.exists() else 0
    settings = chat.settings()
    rows = {
        "model": options.model,
        "prompts": f"{options.prompts}: {kinds}",
        "template": settings.get("template", "the endpoint's own"),
        "tokens": f"{settings.get('max_new_tokens')} at most, greedy",
        "output": f"{output}{f' (goes on: {there} of {len(prompts)} answers are there)' if there else ''}",
    }
    return "\n".join(f"{name:<8}  {value}" for name, value in rows.items())


def _earlier_report(folder: str, judge: "Judge", prompts: "list[Prompt]") -> "SafetyReport":
    """Report of an earlier run, checked to be comparable before any work."""
    from lox_hf.evaluation.comparison import check_comparable
    from lox_hf.evaluation.safety import SAFETY_REPORT_NAME
    from lox_hf.records import SafetyReport

    path = Path(folder) / SAFETY_REPORT_NAME
    try:
        report = SafetyReport.from_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} is not the report of a run: pass the folder that an earlier lox-hf asr wrote."
        ) from error
    check_comparable(report, judge, prompts)
    return report
