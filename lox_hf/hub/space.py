"""The metric for `evaluate` as a Space, from which `evaluate.load("org/attack_success_rate")` takes it."""

from pathlib import Path

from lox_hf.errors import ConfigError
from lox_hf.hub_files import check_token, upload_errors
from lox_hf.records.space import MetricSpace

METRIC = "attack_success_rate"
FOLDER = Path(__file__).parents[1] / "metrics" / METRIC
REQUIREMENTS = "requirements.txt"
PACKAGE = "lox-hf[eval]"
"""The line of the metric's requirements that a Space without access to a released package replaces."""


def push_metric(
    repo_id: str,
    *,
    private: bool = True,
    package: str = PACKAGE,
    token: str | bool | None = None,
    commit_message: str = "Upload the metric attack_success_rate",
    dry_run: bool = False,
) -> MetricSpace:
    """Upload the metric as a Gradio Space, which is made if needed, in one commit.

    A private Space is found by `evaluate.load` only where `HF_TOKEN` or a login may read it. A Space that exists keeps
    who can read it.

    Args:
        repo_id: Hub id of the Space; `evaluate` wants it to end with "/attack_success_rate".
        private: Whether a new Space is private.
        package: What pip installs this package from on the Space, as a line of its requirements.
        token: Hub token; None uses the stored login.
        commit_message: Message of the commit.
        dry_run: Upload nothing and ask nobody.

    Returns:
        What was uploaded, or would be.

    Raises:
        ConfigError: If the name does not end as `evaluate` wants it, or the package is more than one line.
        CheckpointError: If the Hub refuses or cannot be reached.

    Example:
        >>> from lox_hf.hub.space import push_metric
        >>> sorted(push_metric("org/attack_success_rate", dry_run=True).files)
        ['README.md', 'app.py', 'attack_success_rate.py', 'requirements.txt']
    """
    owner, _, name = repo_id.rpartition("/")
    if name != METRIC or not owner:
        raise ConfigError(
            f"'{repo_id}': evaluate looks for a script of the Space's name, so the Space must be OWNER/{METRIC}."
        )
    if not package.strip() or len(package.splitlines()) != 1:
        raise ConfigError(f"The package is one line of requirements, such as '{PACKAGE}'.")
    files = {path.name: path.read_bytes() for path in sorted(FOLDER.iterdir()) if path.is_file()}
    files[REQUIREMENTS] = files[REQUIREMENTS].replace(PACKAGE.encode(), package.strip().encode())
    sizes = {name: len(data) for name, data in files.items()}
    if dry_run:
        return MetricSpace(repo_id, private, sizes)
    check_token(token)
    import huggingface_hub

    with upload_errors(repo_id):
        api = huggingface_hub.HfApi(token=token)
        api.create_repo(repo_id, repo_type="space", space_sdk="gradio", private=private, exist_ok=True)
        operations = [huggingface_hub.CommitOperationAdd(name, data) for name, data in files.items()]
        commit = api.create_commit(repo_id, operations, commit_message=commit_message, repo_type="space")
        found = api.repo_info(repo_id, repo_type="space")
    return MetricSpace(repo_id, getattr(found, "private", None), sizes, str(commit.commit_url))
