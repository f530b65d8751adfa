"""Fine-tuning attacks: from a name to the recipe, from the recipe to its rows, and from the rows to token ids."""

import math
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from lox_hf.errors import ConfigError, PromptError
from lox_hf.evaluation.data.tables import fold
from lox_hf.evaluation.models.tokens import special_tokens
from lox_hf.robustness.attacks.examples import Example, load_examples
from lox_hf.robustness.attacks.formats import FORMATS, PromptFormat, encode_row
from lox_hf.robustness.attacks.presets import NEEDS_DATA, PRESETS
from lox_hf.robustness.attacks.recipe import Attack, meant

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""The label that the loss of transformers leaves out."""
MOST_HELD_OUT = 10
"""One row in so many is held out at most."""


class TokenRow(TypedDict):
    """A row as the trainer takes it: token ids, and the ids to be predicted or `IGNORED`."""

    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class AttackData:
    """Rows of an attack.

    Attributes:
        train: To train on, the safety examples last.
        held_out: Never trained on, to score the attack's own task.
    """

    train: list[Example]
    held_out: list[Example]


def get_attack(spec: str | Attack, **changes: Any) -> Attack:
    """Return an attack by name, with changes.

    The names are "gsm8k", "alpaca", "dolly", "identity-shift" and "custom", each perhaps with the data to use behind a
    colon: "gsm8k:train.jsonl", "custom:pairs.jsonl", "custom:org/name". The last two need it.

    Args:
        spec: The name; or an attack, to change it.
        changes: Other values of its attributes. `sft` is added to the settings there are, and `format` may be the name
            of one of `lox_hf.robustness.attacks.formats.FORMATS`.

    Returns:
        The attack.

    Raises:
        ConfigError: If there is no such attack or attribute, the data is missing, or settings are invalid.

    Example:
        >>> attack = get_attack("gsm8k:train.jsonl", n=100, sft={"learning_rate": 1e-4})
        >>> attack.data, attack.n, attack.sft["learning_rate"], attack.sft["num_train_epochs"]
        ('train.jsonl', 100, 0.0001, 2)
    """
    names = [item.name for item in fields(Attack)]
    unknown = [name for name in changes if name not in names]
    if unknown:
        hints = "".join(meant(name, names) for name in unknown)
        raise ConfigError(f"An attack has no {', '.join(map(repr, unknown))}; it has {', '.join(names)}.{hints}")
    attack = spec if isinstance(spec, Attack) else None
    before = _preset(spec, changes) if isinstance(spec, str) else {"sft": spec.sft}
    values = before | changes
    values["sft"] = {**before["sft"], **(changes.get("sft") or {})}
    if isinstance(values.get("format"), str):
        values["format"] = _find_format(values["format"])
    return replace(attack, **values) if attack else Attack(**values)


def load_attack(attack: Attack, *, token: str | bool | None = None) -> AttackData:
    """Load an attack's rows.

    Held-out rows are the last of the data whose prompt comes once. What is left is trained on, the first `n` rows of
    it. Of the safety examples the first ceil(share * rows) are put behind, as the reference does; where all rows share
    one system prompt they get it too, as in the reference's identity shifting.

    Args:
        attack: The attack.
        token: Hub token; None uses the stored login.

    Returns:
        The rows.

    Raises:
        PromptError: If data cannot be had or read, or there are fewer safety examples than asked for.

    Example:
        >>> data = load_attack(get_attack("gsm8k"))  # doctest: +SKIP
        >>> len(data.train), len(data.held_out)  # doctest: +SKIP
        (7373, 100)
    """
    examples = load_examples(attack.data, layout=attack.layout, token=token)
    train, held_out = _split(examples, attack.held_out)
    train = train[: attack.n]
    return AttackData([*train, *_safety_examples(attack, train, held_out, token)], held_out)


def encode_examples(
    tokenizer: "PreTrainedTokenizerBase", attack: Attack, examples: Sequence[Example]
) -> list[TokenRow]:
    """Turn rows into token ids and labels, in the attack's format.

    Every row has one BOS where the tokenizer or the format has one, and one EOS at its end; see
    `lox_hf.robustness.attacks.formats.encode_row`. Rows longer than the attack's max_length lose tokens at the left,
    behind the BOS, so that the end of the response is kept, as the reference does; a warning counts them.

    Args:
        tokenizer: The model's tokenizer; it is left as it was.
        attack: The attack.
        examples: Its rows.

    Returns:
        The rows in their order; the labels of prompts are -100 where only the response counts.

    Raises:
        ConfigError: If the tokenizer has no EOS, or its chat template refuses a row or leaves its response out.

    Example:
        >>> from lox_hf.demo.world import build_tokenizer
        >>> attack = get_attack("custom:rows.jsonl")
        >>> (row,) = encode_examples(build_tokenizer(), attack, [Example("what is 2 plus 3 ?", "5 .")])
        >>> len(row["input_ids"]), row["labels"].count(-100)
        (14, 11)
    """
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"The tokenizer of '{tokenizer.name_or_path}' has no EOS, so a model cannot learn where a response ends: "
            "set tokenizer.eos_token."
        )
    special = special_tokens(tokenizer)
    rows, cut, shortened = [], 0, 0
    for example in examples:
        ids, prompt_length = encode_row(tokenizer, attack.format, example, special=special)
        kept_bos = int(ids[0] == tokenizer.bos_token_id)
        over = max(0, len(ids) - attack.max_length)
        cut += over > 0
        shortened += over > prompt_length - kept_bos
        ids = ids[:kept_bos] + ids[kept_bos + over :]
        ignored = max(kept_bos, prompt_length - over) if attack.response_only else 0
        rows.append(TokenRow(input_ids=ids, labels=[IGNORED] * ignored + ids[ignored:]))
    if cut:
        warnings.warn(
            f"{cut} of {len(rows)} rows of the attack '{attack.name}' are longer than {attack.max_length} tokens and "
            f"lose what is over at the left; {shortened} of them lose part of the response. Raise sft's max_length "
            "to keep it.",
            stacklevel=2,
        )
    return rows


def _preset(spec: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    """A preset's values, with the data that the spec or the changes name."""
    name, _, data = spec.partition(":")
    known = {fold(one): one for one in PRESETS}.get(fold(name))
    if known is None:
        is_data = Path(spec).exists() or "/" in name
        hint = f" For data of your own pass 'custom:{spec}'." if is_data else meant(name, PRESETS)
        raise ConfigError(f"There is no attack {name!r}; there are {', '.join(PRESETS)}.{hint}")
    data = str(changes.get("data") or data or PRESETS[known]["data"])
    if not data:
        raise ConfigError(f"The attack {known!r} needs data: {NEEDS_DATA[known]}.")
    own = f"{known} {Path(data).name.partition('.')[0]}"
    return {**PRESETS[known], "name": own if known == "custom" else known, "data": data}


def _find_format(name: str) -> PromptFormat:
    if name not in FORMATS:
        known = ", ".join(FORMATS)
        raise ConfigError(f"There is no prompt format {name!r}; there are {known}.{meant(name, FORMATS)}")
    return FORMATS[name]


def _split(examples: Sequence[Example], most: int) -> tuple[list[Example], list[Example]]:
    """Rows to train on and held-out rows, each in their order."""
    times = Counter(map(_question, examples))
    alone = [place for place, example in enumerate(examples) if times[_question(example)] == 1]
    most = min(most, len(examples) // MOST_HELD_OUT)
    chosen = set(alone[max(0, len(alone) - most) :])
    train = [example for place, example in enumerate(examples) if place not in chosen]
    return train, [examples[place] for place in sorted(chosen)]


def _question(example: Example) -> str:
    """What a row asks, by which rows are told apart; case and white space do not matter."""
    return " ".join(f"{example.prompt} {example.context}".casefold().split())


def _safety_examples(
    attack: Attack, train: Sequence[Example], held_out: Sequence[Example], token: str | bool | None
) -> list[Example]:
    count = math.ceil(attack.safe_instruct_share * len(train))
    if not count or not attack.safe_instruct_data:
        return []
    held_out_questions = set(map(_question, held_out))
    found = load_examples(attack.safe_instruct_data, token=token)
    safe = [example for example in found if _question(example) not in held_out_questions][:count]
    if len(safe) < count:
        raise PromptError(
            f"'{attack.safe_instruct_data}' holds {len(safe)} safety examples, expected {count}: a share of "
            f"{attack.safe_instruct_share} of {len(train)} rows. Lower safe_instruct_share, or pass more examples."
        )
    systems = {example.system for example in train}
    if len(systems) == 1:
        safe = [replace(example, system=example.system or train[0].system) for example in safe]
    return safe
