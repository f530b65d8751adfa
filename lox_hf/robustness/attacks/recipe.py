"""One fine-tuning attack as plain data: what is trained on, how it is written, and how it is trained."""

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from difflib import get_close_matches
from typing import Any, Literal, get_args

from lox_hf.errors import ConfigError
from lox_hf.evaluation.models.loading import quiet_import
from lox_hf.robustness.attacks.examples import LAYOUTS
from lox_hf.robustness.attacks.formats import AUTO, PromptFormat
from lox_hf.robustness.attacks.presets import PRESETS

Task = Literal["loss", "exact", "number"]
TASKS = get_args(Task)
# Spelled right, so that these can be checked without importing TRL.
_KNOWN_SFT = {name for preset in PRESETS.values() for name in preset["sft"]}


@dataclass(frozen=True)
class Attack:
    """A fine-tuning that may cost a model its safety, meant or not.

    Attributes:
        name: What reports call it.
        data: File or Hub data set, as `lox_hf.robustness.attacks.examples.load_examples` takes it.
        format: How a row becomes text.
        response_only: Whether the loss is on the response alone, or on the prompt as well.
        sft: Settings of TRL's SFTConfig.
        task: How its own task is scored on held-out rows: by the "loss" of the response alone, and also by answers
            that are "exact"ly the response or end in its "number", as GSM8K's.
        n: Rows to train on, the first; None takes all that are not held out.
        held_out: Rows from the end that are never trained on, a tenth of all at most.
        safe_instruct_share: Safety examples mixed in, as a share of the rows to train on (SafeInst; the paper's
            baseline is 0.025).
        safe_instruct_data: Where they are, in any layout.
        lora: Settings of PEFT's LoraConfig; None trains all weights.
        layout: Column of the prompts, where the data has several.
        source: Where the settings come from.

    Raises:
        ConfigError: If settings are out of range or unknown; all of them are listed.

    Example:
        >>> Attack("mine", "rows.jsonl", sft={"num_train_epochs": 3}, task="exact").response_only
        True
    """

    name: str
    data: str
    format: PromptFormat = AUTO
    response_only: bool = True
    sft: Mapping[str, Any] = field(default_factory=dict)
    task: Task = "loss"
    n: int | None = None
    held_out: int = 100
    safe_instruct_share: float = 0.0
    safe_instruct_data: str | None = None
    lora: Mapping[str, Any] | None = None
    layout: str = "auto"
    source: str = ""

    def __post_init__(self) -> None:
        problems = [*_value_problems(self), *_setting_problems(self)]
        if problems:
            raise ConfigError(f"Invalid attack {self.name!r}: {'; '.join(problems)}.")

    @property
    def max_length(self) -> int:
        """Longest row, in tokens: SFTConfig's setting, 1024 by default."""
        return self.sft.get("max_length", 1024)

    def settings(self) -> dict[str, Any]:
        """Return what its training depends on besides the rows themselves, as JSON values."""
        return {name: value for name, value in asdict(self).items() if name != "source"}


def meant(name: str, known: Collection[str]) -> str:
    """Return a question that suggests the nearest of the known names; empty where none is near.

    Args:
        name: What was written.
        known: What there is.

    Returns:
        The question, with a space in front.

    Example:
        >>> meant("gsm8", ["gsm8k", "dolly"])
        " Did you mean 'gsm8k'?"
    """
    near = get_close_matches(name.casefold(), known, n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def _value_problems(attack: Attack) -> list[str]:
    share, data = attack.safe_instruct_share, attack.safe_instruct_data
    is_share = isinstance(share, int | float) and 0 <= share < 1
    checks = {
        "name is empty": not attack.name,
        "data is empty, expected a file or a Hub data set": not attack.data,
        f"format is {attack.format!r:.40}, expected a PromptFormat": not isinstance(attack.format, PromptFormat),
        f"task is {attack.task!r}, expected one of {', '.join(TASKS)}": attack.task not in TASKS,
        f"n is {attack.n!r}, expected a positive integer, or None for all": attack.n is not None
        and not _is_integer(attack.n, 1),
        f"held_out is {attack.held_out!r}, expected an integer from 0": not _is_integer(attack.held_out, 0),
        f"safe_instruct_share is {share!r}, expected a share in [0, 1)": not is_share,
        "safe_instruct_share is set without safe_instruct_data; pass the path of safety examples, such as "
        "safety_only_data_Instructions.json of github.com/vinid/safety-tuned-llamas": bool(share) and not data,
        f"layout is {attack.layout!r}, expected one of {', '.join(LAYOUTS)}": attack.layout not in LAYOUTS,
    }
    return [problem for problem, is_one in checks.items() if is_one]


def _setting_problems(attack: Attack) -> Iterable[str]:
    for name, settings, known in (("sft", attack.sft, _sft_settings), ("lora", attack.lora or {}, _lora_settings)):
        if not isinstance(settings, Mapping):
            yield f"{name} is {type(settings).__name__}, expected settings by name"
            continue
        strange = set(settings) - _KNOWN_SFT if name == "sft" else set(settings)
        names = known() if strange else None
        if names:
            yield from (f"{name} has no setting {one!r}.{meant(one, names)}" for one in sorted(strange - names))
        try:
            json.dumps(dict(settings))
        except (TypeError, ValueError) as error:
            yield f"{name} holds what JSON cannot write ({error}); pass numbers, texts, lists and dicts"
    if isinstance(attack.sft, Mapping) and not _is_integer(attack.max_length, 2):
        yield f"sft's max_length is {attack.max_length!r}, expected an integer from 2"


def _is_integer(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _sft_settings() -> set[str] | None:
    """Names of SFTConfig's settings; None where TRL is not installed, and whoever trains will say so."""
    try:
        with quiet_import():
            from trl import SFTConfig
    except ImportError:
        return None
    return {item.name for item in fields(SFTConfig)}


def _lora_settings() -> set[str] | None:
    try:
        with quiet_import():
            from peft import LoraConfig
    except ImportError:
        return None
    return {item.name for item in fields(LoraConfig)}
