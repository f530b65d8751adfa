"""What was uploaded as a Space."""

from dataclasses import dataclass, field

from lox_hf.records.base import JsonRecord


@dataclass(frozen=True)
class MetricSpace(JsonRecord):
    """A metric as a Space on the Hub.

    Attributes:
        repo_id: Hub id of the Space.
        private: Whether only its owner can read it; None where nobody has asked the Hub.
        files: Bytes of each file that was, or would be, uploaded.
        url: URL of the commit; None where nothing was uploaded.

    Example:
        >>> from lox_hf.records.space import MetricSpace
        >>> MetricSpace("org/attack_success_rate", private=True, files={"app.py": 1554}).url is None
        True
    """

    repo_id: str
    private: bool | None
    files: dict[str, int] = field(default_factory=dict)
    url: str | None = None
