"""`lox-hf push`: a hardened model, an adapter or a subspace on the Hub, with its card."""

import argparse
from typing import TYPE_CHECKING

from lox_hf.cli.config_file import merge_file

if TYPE_CHECKING:
    from lox_hf.records import PushReport


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = commands.add_parser(
        "push",
        help="publish on the Hub, with a model card",
        description="Publish a hardened checkpoint, a LoX adapter or a subspace on the Hub in one commit: weights, "
        "settings, reports, what was measured, and a model card. The repository is private unless --public is given.",
    )
    parser.add_argument(
        "model_position", nargs="?", metavar="FOLDER", help="what lox-hf harden, adapter or subspace wrote"
    )
    parser.add_argument("repo_position", nargs="?", metavar="REPO_ID", help="the repository, such as org/model-lox")
    parser.add_argument("--model", metavar="FOLDER", help="the folder, as an option")
    parser.add_argument("--repo-id", metavar="REPO_ID", help="the repository, as an option")
    parser.add_argument(
        "--evaluation",
        nargs="+",
        metavar="PATH",
        help="runs of lox-hf asr, utility and stress on the aligned and the hardened model: folders or reports",
    )
    parser.add_argument("--public", action="store_true", default=None, help="make a new repository public")
    parser.add_argument("--license", metavar="ID", help="licence (default: that of the aligned model's card)")
    parser.add_argument("--commit-message", metavar="TEXT", help="message of the commit")
    parser.add_argument(
        "--dry-run", action="store_true", default=None, help="print the files and the card, send nothing"
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file with any of these options; the command line wins")
    parser.add_argument("--json", action="store_true", default=None, help="print the record as JSON and nothing else")
    parser.set_defaults(func=run, interrupted="nothing was published; large files that arrived are not sent again")


def run(options: argparse.Namespace) -> None:
    """Publish, and say where."""
    from lox_hf.errors import ConfigError

    repo_position = options.repo_position
    options = merge_file(options)
    repo_id = options.repo_id or repo_position
    if not repo_id:
        raise ConfigError("No repository is named: lox-hf push FOLDER REPO_ID, such as org/model-lox.")
    from lox_hf.hub.push import push_to_hub

    message = {"commit_message": options.commit_message} if options.commit_message else {}
    report = push_to_hub(
        options.model,
        repo_id,
        evaluation=options.evaluation,
        private=not options.public,
        license=options.license,
        dry_run=bool(options.dry_run),
        **message,
    )
    if options.json:
        print(report.to_json(), end="")
    else:
        print(f"{report.card}\n{_files(report)}" if options.dry_run else _files(report))


def _files(report: "PushReport") -> str:
    """What was or would be published, a line a file, and where it is."""
    width = max(len(file.path) for file in report.files)
    lines = [f"{file.path:<{width}}  {file.size_bytes:>15,} bytes" for file in report.files]
    lines += [f"{name:<{width}}  not published" for name in report.left_out]
    lines += [f"{name:<{width}}  taken away: an earlier push left it" for name in report.removed]
    seen = "private" if report.private else "public"
    what = f"{len(report.files)} files, {report.total_bytes / 1e9:.3f} GB"
    if report.commit_url:
        lines.append(f"\n{what} in one commit: {report.commit_url} ({seen}).")
    else:
        lines.append(f"\n{what} would go to {report.repo_id} ({seen}). Nothing was sent.")
    return "\n".join(lines)
