"""Put conversations to a model and keep every answer at once, so that a killed run goes on where it was."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from lox_hf.errors import ConfigError
from lox_hf.evaluation.models.chat import ChatModel, Conversation, Reply
from lox_hf.progress import progress_bar
from lox_hf.run_folder import RunFolder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

GENERATIONS = "generations.jsonl"


def as_chat_model(
    model: "PreTrainedModel | ChatModel", tokenizer: "PreTrainedTokenizerBase | None", **settings: Any
) -> ChatModel:
    """Return what answers: a `ChatModel` as it is, a loaded model as a `LocalModel`.

    Args:
        model: A loaded model, or a `ChatModel` such as an `Endpoint`.
        tokenizer: The model's tokenizer; None for a `ChatModel`.
        settings: Further arguments of `LocalModel` where they are not None; a `ChatModel` has its own.

    Returns:
        The `ChatModel`.

    Raises:
        ConfigError: If a tokenizer is missing, or one or a setting is given where none is used.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    if not (hasattr(model, "replies") and hasattr(model, "settings")):
        from lox_hf.evaluation.models.local import LocalModel

        return LocalModel(cast("PreTrainedModel", model), cast("PreTrainedTokenizerBase", tokenizer), **given)
    if tokenizer is not None:
        raise ConfigError(f"{type(model).__name__} needs no tokenizer: leave it out.")
    if given:
        raise ConfigError(
            f"{type(model).__name__} has its own {', '.join(given)}: set it there, and leave it out here."
        )
    return cast(ChatModel, model)


def answer(
    run: RunFolder,
    chat: ChatModel,
    conversations: Sequence[Conversation],
    about: Sequence[dict[str, Any]],
    progressbar: bool | None = None,
) -> list[Reply]:
    """Answer conversations; those that an earlier process of the run answered are not answered again.

    Args:
        run: The open folder of the run; its `generations.jsonl` gets a line for every answer as soon as it is there.
        chat: What answers.
        conversations: The conversations.
        about: What stands in the line of each besides its answer.
        progressbar: Show a progress bar; None shows it on a terminal only.

    Returns:
        A reply for every conversation, in their order.

    Raises:
        OutputError: If the folder cannot be written.
        EndpointError: If an endpoint cannot be used; what was answered is kept.
    """
    journal = run.journal(GENERATIONS)
    found: dict[int, Reply] = {}
    local: Any = chat
    if getattr(chat, "batch_size", 0) is None:  # the batches of an earlier process, for the same answers to the bit
        local.batch_size = run.kept.get("batch_size")
    with progress_bar(len(conversations), progressbar, "Answering", unit="prompt", done=len(journal.items)) as advance:
        for position, reply in chat.replies(conversations, done=journal.items.keys()):
            advance(position not in journal.items)
            run.keep(batch_size=getattr(chat, "batch_size", None))
            if reply.transient:
                found[position] = reply
            else:
                line = {"response": reply.text, "cut_off": reply.cut_off, "error": reply.error}
                journal.add(position, about[position] | line)
    for position, item in journal.items.items():
        found[position] = Reply(item["response"], item["cut_off"], item["error"])
    return [found.get(position, Reply("", error="there is no answer")) for position in range(len(conversations))]
