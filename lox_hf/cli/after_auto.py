"""What can be done with a hardened model at once: push it, chat with it, run benchmarks on it."""

import argparse
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from lox_hf.errors import ConfigError, LoxError

BENCHMARK_PROGRAM = "lm_eval"
BENCHMARK_TASKS = "ifeval,truthfulqa_mc2"
CHAT_TOKENS = 512
MENU = """
What next?
  1  push it to the Hub, as a private model
  2  chat with it
  3  run benchmarks on it (lm-evaluation-harness)
  4  stop here
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the steps."""
    add = parser.add_argument_group("afterwards (a terminal is asked where none is given)").add_argument
    add("--push", metavar="REPO", help="push the hardened model to this Hub repository, a new one is private")
    add("--chat", action="store_true", default=None, help="chat with the hardened model; Ctrl-D ends")
    add(
        "--benchmark",
        metavar="TASKS",
        help=f"run these tasks of lm-evaluation-harness on it, such as {BENCHMARK_TASKS}",
    )


def check(options: argparse.Namespace) -> None:
    """Refuse, before any work, what could not be done after it.

    Args:
        options: Complete options.

    Raises:
        ConfigError: If a chat is asked for without a terminal, benchmarks without their program, or one of them beside
            JSON; all of it is listed.
    """
    problems = []
    if options.chat and not sys.stdin.isatty():
        problems.append("--chat needs a terminal to type in")
    if options.benchmark and shutil.which(BENCHMARK_PROGRAM) is None:
        problems.append(f"--benchmark needs {BENCHMARK_PROGRAM}: pip install 'lm-eval[hf]'")
    if options.json and (options.chat or options.benchmark):
        problems.append("--json prints a record and nothing else: leave --chat and --benchmark out")
    if problems:
        raise ConfigError(f"Cannot go on with the result: {'; '.join(problems)}.")


def go_on(folder: Path, options: argparse.Namespace) -> None:
    """Do what the options ask for; where they ask for nothing and somebody is there, ask.

    Args:
        folder: The hardened model.
        options: Complete options.

    Raises:
        CheckpointError: If the Hub refuses or cannot be reached.
    """
    if options.push:
        push(folder, options.push, quiet=bool(options.json))
    if options.benchmark:
        benchmark(folder, options.benchmark)
    if options.chat:
        chat(folder, options)
    asked = options.push or options.benchmark or options.chat or options.json
    if not asked and sys.stdin.isatty() and sys.stdout.isatty():
        _menu(folder, options)


def push(folder: Path, repo_id: str, *, quiet: bool = False) -> None:
    """Publish the hardened model with a card of what this run measured; a repository that is new is private."""
    from lox_hf.hub.push import push_to_hub

    if not quiet:
        print(f"Pushing {folder} to {repo_id} ...", flush=True)
    report = push_to_hub(folder, repo_id, evaluation=folder.parent)
    if not quiet:
        print(f"Pushed: {report.commit_url}")


def chat(folder: Path, options: argparse.Namespace) -> None:
    """Talk with the hardened model until the input ends; it remembers what was said."""
    from lox_hf.evaluation.models.chat import Message
    from lox_hf.evaluation.models.loading import load_model
    from lox_hf.evaluation.models.local import LocalModel

    model, tokenizer = load_model(
        folder,
        dtype=options.dtype or "auto",
        device=options.device,
        trust_remote_code=bool(options.trust_remote_code),
    )
    answering = LocalModel(
        model,
        tokenizer,
        template=options.template or "auto",
        max_new_tokens=options.max_new_tokens or CHAT_TOKENS,
        batch_size=1,
    )
    turns: list[Message] = []
    if options.system_prompt:
        turns.append({"role": "system", "content": options.system_prompt})
    print("Chat with the hardened model. An empty line begins anew, Ctrl-D ends.")
    while (said := _read("you: ")) is not None:
        if not said.strip():
            del turns[bool(options.system_prompt) :]
            print("(a new conversation)")
            continue
        turns.append({"role": "user", "content": said})
        try:
            reply = dict(answering.replies([turns]))[0]
        except LoxError as error:  # such as a conversation that has become too long
            turns.pop()
            print(f"(no answer: {error} An empty line begins anew.)")
            continue
        turns.append({"role": "assistant", "content": reply.text})
        print(f"model: {reply.text or f'(no answer: {reply.error})'}", flush=True)
    print()


def benchmark(folder: Path, tasks: str) -> None:
    """Run lm-evaluation-harness on the hardened model, by a command that is shown first."""
    command = [BENCHMARK_PROGRAM, "--model", "hf", "--model_args", f"pretrained={folder}", "--tasks", tasks]
    command += ["--batch_size", "auto", "--output_path", str(folder.parent / "benchmarks")]
    command += ["--apply_chat_template"] * _has_chat_template(folder)
    if shutil.which(BENCHMARK_PROGRAM) is None:
        print(f"{BENCHMARK_PROGRAM} is not installed: pip install 'lm-eval[hf]'. Then run\n  {shlex.join(command)}")
        return
    print(f"Running\n  {shlex.join(command)}", flush=True)
    code = subprocess.run(command, check=False).returncode
    if code:
        print(f"lox-hf: warning: {BENCHMARK_PROGRAM} ended with code {code}; its own words are above", file=sys.stderr)


def _has_chat_template(folder: Path) -> bool:
    config = folder / "tokenizer_config.json"
    return (folder / "chat_template.jinja").is_file() or (config.is_file() and "chat_template" in config.read_text())


def _menu(folder: Path, options: argparse.Namespace) -> None:
    """Ask what next, again and again; what fails is said, and the menu comes back."""
    steps: dict[str, Callable[[], None]] = {
        "1": lambda: _with(_read("repository, such as org/name: "), lambda repo: push(folder, repo)),
        "2": lambda: chat(folder, options),
        "3": lambda: benchmark(folder, _read(f"tasks (default: {BENCHMARK_TASKS}): ") or BENCHMARK_TASKS),
    }
    while True:
        print(MENU)
        answer = (_read("1-4: ") or "4").strip()
        if answer == "4":
            return
        if answer not in steps:
            print(f"There is no {answer!r}; type 1, 2, 3 or 4.")
            continue
        try:
            steps[answer]()
        except LoxError as error:
            print(f"lox-hf: error: {error}", file=sys.stderr)


def _with(text: str | None, use: Callable[[str], None]) -> None:
    if text and text.strip():
        use(text.strip())


def _read(prompt: str) -> str | None:
    """A line that is typed; None where the input has ended, by Ctrl-D or Ctrl-C: everything is finished by then."""
    try:
        return input(prompt)
    except (EOFError, KeyboardInterrupt):
        return None
