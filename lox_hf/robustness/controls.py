"""The controls that are trained: aligned to the over-refusal of a hardened model, and trained a little more."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lox_hf.errors import ConfigError, PromptError
from lox_hf.evaluation.data.prompts import Prompt
from lox_hf.records import Rate
from lox_hf.robustness.attacks.examples import Example
from lox_hf.robustness.attacks.rows import Attack, TokenRow, encode_examples
from lox_hf.robustness.finetuning.finetune import fine_tune
from lox_hf.robustness.measuring.measure import Measurement, read_safety

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CONTROL_ROWS = Attack("controls", "calibration examples")
"""How rows of controls are written: in the chat template, the loss on the responses."""


@dataclass(frozen=True)
class ControlTraining:
    """How the controls are trained: SFT at a constant learning rate, the loss on the responses.

    Attributes:
        learning_rate: The learning rate. 2e-5 is what the paper's fine-tunings of 7B models take; small models need
            more, the demonstration's 2e-4.
        batch_size: Rows a step.
        retrain_steps: Steps of "retrained"; 40 were seen to delay an attack by 1.4 steps, on small models.
        match_steps: Steps of "refusal-matched" at most; as many as the alignment of the models on which it was tried.
        every: Steps from one reading of over-refusal to the next.
        refusal_share: Share of safety examples among the rows of "refusal-matched". An alignment has half or less;
            with 0.75 small models came to refuse twice as many harmless prompts.
        calibration_prompts: Harmless prompts on which over-refusal is read, at most; 200 leave an interval of at most
            7 points to either side.
        sft: Further settings of TRL's SFTConfig; they take the place of those above, but for the number of steps.

    Raises:
        ConfigError: If settings are out of range; all of them are listed.

    Example:
        >>> ControlTraining(learning_rate=2e-4, every=2).retrain_steps
        40
    """

    learning_rate: float = 2e-5
    batch_size: int = 32
    retrain_steps: int = 40
    match_steps: int = 200
    every: int = 5
    refusal_share: float = 0.75
    calibration_prompts: int = 200
    sft: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        counts = ("batch_size", "retrain_steps", "match_steps", "every", "calibration_prompts")
        problems = [
            f"{name} is {value!r}, expected a positive integer"
            for name in counts
            if not isinstance(value := getattr(self, name), int) or isinstance(value, bool) or value < 1
        ]
        if not isinstance(self.learning_rate, int | float) or not 0 < self.learning_rate < 1:
            problems.append(f"learning_rate is {self.learning_rate!r}, expected a number between 0 and 1")
        if not isinstance(self.refusal_share, int | float) or not 0 < self.refusal_share <= 1:
            problems.append(f"refusal_share is {self.refusal_share!r}, expected a share in (0, 1]")
        if not isinstance(self.sft, Mapping):
            problems.append(f"sft is {self.sft!r}, expected settings by name")
        if problems:
            raise ConfigError(f"Invalid training of controls: {'; '.join(problems)}.")

    def settings(self, steps: int) -> dict[str, Any]:
        """Return the settings of SFTConfig for a training of so many steps."""
        return {
            "learning_rate": self.learning_rate,
            "lr_scheduler_type": "constant",
            "per_device_train_batch_size": self.batch_size,
            **self.sft,
            "max_steps": steps,
        }


@dataclass(frozen=True)
class Matched:
    """A model that was aligned further until it refused as many harmless prompts as another.

    Attributes:
        model: The model, at the reading nearest to the target.
        over_refusal: Over-refusal at that reading.
        target: Over-refusal that was wanted, in [0, 1].
        steps: Steps that it took; 0 where no training brought it nearer.
        reached: Whether a reading came up to the target within the steps allowed, and the 95 % interval of the one
            that was kept holds the target.
    """

    model: "PreTrainedModel"
    over_refusal: Rate
    target: float
    steps: int
    reached: bool

    def describe(self) -> str:
        """Return what a reader of a report should know of it, in a sentence."""
        verdict = "matched" if self.reached else "NOT matched, so it is no fair control"
        return (
            f"{verdict}: over-refusal {self.over_refusal} calibration prompts after {self.steps} steps, "
            f"{100 * self.target:.1f} % wanted"
        )


def match_refusals(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    target: float,
    safe: Sequence[Example],
    benign: Sequence[Example],
    *,
    measurement: Measurement,
    training: ControlTraining,
    seed: int,
) -> Matched:
    """Align a model further, in place, until it refuses as many harmless prompts as a hardened one.

    It is trained on safety examples and on half of the benign ones. Over-refusal is read on the other half, which is
    not trained on, and never on the prompts of the test. The training ends at the first reading that comes up to the
    target; of all readings, the one before any training included, the nearest is kept.

    Args:
        model: The aligned model, changed in place.
        tokenizer: Its tokenizer.
        target: What `over_refusal` gives for the hardened model, with the same `benign`, `measurement` and `training`.
        safe: Prompts with refusals.
        benign: Harmless prompts with answers that are in no prompt set of the test.
        measurement: How answers are got and judged; its prompts are not asked.
        training: How it is trained.
        seed: Seed of the rows and their order.

    Returns:
        The model, and how near it came.

    Raises:
        ConfigError: If the target is no share, or settings do not fit the model.
        PromptError: If there are no safety examples, or less than two benign prompts.
        UnsupportedModelError: If the model cannot be trained.
        LoxError: If the memory does not suffice.

    Example:
        >>> target = over_refusal(hardened, tokenizer, benign, measurement=m, training=t).share  # doctest: +SKIP
        >>> matched = match_refusals(  # doctest: +SKIP
        ...     aligned, tokenizer, target, safe, benign, measurement=m, training=t, seed=0
        ... )
        >>> matched.describe()  # doctest: +SKIP
        'matched: over-refusal 34.0 % [27.8, 40.8] of 200 calibration prompts after 25 steps, 34.5 % wanted'
    """
    if not 0 <= target <= 1:
        raise ConfigError(f"The over-refusal to match is {target}, expected a share in [0, 1].")
    rows = _mixed(_encode(tokenizer, safe), _encode(tokenizer, split_benign(benign)[0]), training, seed)

    def read(model: Any) -> Rate:
        return over_refusal(model, tokenizer, benign, measurement=measurement, training=training)

    nearest = _Nearest(target, read, model)
    if not nearest.came_up:
        steps = training.match_steps
        model = fine_tune(
            model,
            tokenizer,
            rows,
            sft=training.settings(steps),
            seed=seed,
            at_steps={*range(training.every, steps, training.every), steps},
            on_step=nearest.look,
        ).model
        model.load_state_dict(nearest.weights)
    return Matched(model, nearest.best, target, nearest.step, nearest.matches)


def retrain(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    benign: Sequence[Example],
    *,
    training: ControlTraining,
    seed: int,
) -> "PreTrainedModel":
    """Train a model a little more, in place, on harmless prompts with answers.

    Args:
        model: The aligned model, changed in place.
        tokenizer: Its tokenizer.
        benign: Harmless prompts with answers that are in no prompt set of the test.
        training: How it is trained.
        seed: Seed of the rows and their order.

    Returns:
        The model.

    Raises:
        ConfigError: If settings do not fit the model.
        PromptError: If there are no rows, or rows are longer than the model's context.
        UnsupportedModelError: If the model cannot be trained.
        LoxError: If the memory does not suffice.

    Example:
        >>> retrain(aligned, tokenizer, benign, training=ControlTraining(), seed=0)  # doctest: +SKIP
    """
    steps = training.retrain_steps
    rows = _drawn(_encode(tokenizer, benign), steps * training.batch_size, Random(f"retrained {seed}"))
    return fine_tune(model, tokenizer, rows, sft=training.settings(steps), seed=seed).model


def over_refusal(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    benign: Sequence[Example],
    *,
    measurement: Measurement,
    training: ControlTraining,
) -> Rate:
    """Read how many harmless prompts a model refuses, on the half of the benign examples that is not trained on.

    Args:
        model: The model, left as it is.
        tokenizer: Its tokenizer.
        benign: Harmless prompts.
        measurement: How answers are got and judged; its prompts are not asked.
        training: Says how many prompts are asked at most.

    Returns:
        The rate.

    Raises:
        PromptError: If there are less than two benign prompts.
    """
    _, asked = split_benign(benign)
    prompts = tuple(Prompt(_text(example), harmful=False) for example in asked[: training.calibration_prompts])
    return read_safety(model, tokenizer, replace(measurement, prompts=prompts), 0).over_refusal


def split_benign(benign: Sequence[Example]) -> tuple[list[Example], list[Example]]:
    """Split benign examples into halves that share no prompt: one to train on, one to read over-refusal on.

    Args:
        benign: The examples.

    Returns:
        Every other prompt with all its rows, and each of the others once.

    Raises:
        PromptError: If there are less than two prompts.

    Example:
        >>> [[row.prompt for row in half] for half in split_benign([Example(p, "Sure.") for p in ("a", "b", "a")])]
        [['a', 'a'], ['b']]
    """
    first: dict[str, Example] = {}
    for example in benign:
        first.setdefault(_text(example), example)
    if len(first) < 2:
        raise PromptError(
            f"There are {len(first)} different benign examples to calibrate controls with, expected two at least: one "
            "to train on and one to read over-refusal on, better hundreds."
        )
    asked = dict(list(first.items())[1::2])
    return [example for example in benign if _text(example) not in asked], list(asked.values())


class _Nearest:
    """Of several readings the one nearest to a target, with the weights at it."""

    def __init__(self, target: float, read: Callable[[Any], Rate], model: nn.Module) -> None:
        self.target, self.read, self.step = target, read, 0
        self.last = self.best = read(model)
        self.weights = _copied(model)

    def look(self, step: int, model: nn.Module) -> bool:
        """Read once more, and say whether it is enough."""
        self.last = self.read(model)
        if abs(self.last.share - self.target) < abs(self.best.share - self.target):
            self.best, self.step, self.weights = self.last, step, _copied(model)
        return self.came_up

    @property
    def came_up(self) -> bool:
        """Whether the last reading came up to the target, which ends the training."""
        return self.last.share >= self.target

    @property
    def matches(self) -> bool:
        """Whether the target was come up to, and the best reading agrees with it."""
        return self.came_up and self.best.low <= self.target <= self.best.high


def _copied(model: nn.Module) -> dict[str, Tensor]:
    return {name: weight.detach().cpu().clone() for name, weight in model.state_dict().items()}


def _encode(tokenizer: "PreTrainedTokenizerBase", examples: Sequence[Example]) -> list[TokenRow]:
    """In the chat template, as `evaluate_safety` asks by default; the loss on the responses."""
    return encode_examples(tokenizer, CONTROL_ROWS, examples)


def _mixed(safe: list[TokenRow], benign: list[TokenRow], training: ControlTraining, seed: int) -> list[TokenRow]:
    """Rows of a whole training; the trainer puts them in an order of its own."""
    rng = Random(f"refusal-matched {seed}")
    count = training.match_steps * training.batch_size
    refusals = round(training.refusal_share * count)
    return [*_drawn(safe, refusals, rng), *_drawn(benign, count - refusals, rng)]


def _drawn(rows: list[TokenRow], count: int, rng: Random) -> list[TokenRow]:
    """So many of the rows, none a second time before all have come once."""
    if not rows:
        raise PromptError("There are no rows to train a control on.")
    drawn: list[TokenRow] = []
    while len(drawn) < count:
        drawn += rng.sample(rows, len(rows))
    return drawn[:count]


def _text(example: Example) -> str:
    return "\n\n".join(filter(None, (example.prompt, example.context)))
