"""`load_report`: what a published model says that was done to it."""

from pathlib import Path

from lox_hf.errors import CheckpointError
from lox_hf.hub.artefact import read_report
from lox_hf.hub_files import fetch_file
from lox_hf.records import REPORT_NAME, HardeningReport


def load_report(
    name_or_path: str | Path, *, revision: str | None = None, token: str | bool | None = None
) -> HardeningReport:
    """Read `lox_report.json` of a hardened model, an adapter or a subspace: what was done to every matrix.

    Args:
        name_or_path: Folder or Hub id.
        revision: Revision on the Hub.
        token: Hub token; None uses the stored login.

    Returns:
        The report.

    Raises:
        CheckpointError: If there is no such file, or it is no report.

    Example:
        >>> from lox_hf import load_report
        >>> load_report("org/hardened").energy_share  # doctest: +SKIP
        0.731
    """
    report = read_report(fetch_file(name_or_path, REPORT_NAME, revision=revision, token=token).parent)
    if report is None:
        raise CheckpointError(f"'{name_or_path}' has no {REPORT_NAME}.")
    return report
