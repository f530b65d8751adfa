"""`lox-hf push-metric`: the metric for evaluate as a Space on the Hub."""

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lox_hf.records.space import MetricSpace


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = commands.add_parser(
        "push-metric",
        help="upload the metric for evaluate as a Space",
        description='Upload attack_success_rate as a Gradio Space, for evaluate.load("ORG/attack_success_rate").',
    )
    parser.add_argument("repo_id", metavar="ORG/attack_success_rate", help="Hub id of the Space, made if needed")
    parser.add_argument("--public", action="store_true", help="make a new Space public (default: private)")
    parser.add_argument(
        "--package",
        metavar="REQUIREMENT",
        help="what the Space installs this package from, such as 'lox-hf[eval] @ https://...' (default: lox-hf[eval])",
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would be uploaded, upload nothing")
    parser.add_argument("--json", action="store_true", help="print the record as JSON and nothing else")
    parser.set_defaults(func=run)


def run(options: argparse.Namespace) -> None:
    """Upload, and say how it is loaded."""
    from lox_hf.hub.space import PACKAGE, push_metric

    space = push_metric(
        options.repo_id, private=not options.public, package=options.package or PACKAGE, dry_run=options.dry_run
    )
    print(space.to_json() if options.json else summary(space))


def summary(space: "MetricSpace") -> str:
    """The record in words."""
    state = {True: "private", False: "public", None: "as it was"}[space.private]
    files = "\n".join(f"  {name:<24}{size:>8} bytes" for name, size in space.files.items())
    if space.url is None:
        return f"The Space {space.repo_id}, {state} if it is new, would get:\n{files}\nNothing was uploaded."
    load = f'Load it with evaluate.load("{space.repo_id}").'
    if space.private:
        load += " It is private: that works only with a login that may read it. Its settings on the Hub open it."
    return f"The Space {space.repo_id} ({state}) got:\n{files}\n{space.url}\n{load}"
