"""Small tokenizers that split texts as large ones do: bytes with merges, and LLaMA-2's, with a space in front."""

from collections.abc import Sequence

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA_CHAT = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }} {{ eos_token }}"
    "{% else %}{{ raise_exception('no system turn') }}{% endif %}{% endfor %}"
)
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
_WORDS = ("Response", "Instruction", "Blue", "blue", "the", "is", "###")


def byte_tokenizer(
    chat_template: str | None = None, eos: str = "</s>", merges: tuple[str, ...] = (" Blue", "\n\n", ":\n")
) -> PreTrainedTokenizerFast:
    """Bytes, with words that may take a space or a line break with them, as in GPT-2 and LLaMA-3."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    spelled = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(w) for w in merges]
    backend = Tokenizer(models.BPE(*_vocabulary(symbols, [found[0][0] for found in spelled])))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return _finished(backend, chat_template, eos)


def llama_tokenizer(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """Characters and words, every text with a space put in front, as in LLaMA-2."""
    symbols = sorted({"\u2581", "\n", *map(chr, range(33, 127)), "\u2019", "\u201c", "\u201d", "\u00e9"})
    backend = Tokenizer(models.BPE(*_vocabulary(symbols, _WORDS, space="\u2581"), unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return _finished(backend, chat_template, "</s>")


def _vocabulary(
    symbols: Sequence[str], words: Sequence[str], space: str = ""
) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary, and merges that put words together symbol by symbol, and then a space in front of them."""
    pairs = dict.fromkeys((word[:end], word[end]) for word in words for end in range(1, len(word)))
    pairs |= dict.fromkeys((space, word) for word in words if space)
    tokens = dict.fromkeys([*SPECIAL, *symbols, *(left + right for left, right in pairs)])
    return {token: number for number, token in enumerate(tokens)}, list(pairs)


def _finished(backend: Tokenizer, chat_template: str | None, eos: str) -> PreTrainedTokenizerFast:
    backend.add_special_tokens(SPECIAL)
    start = backend.token_to_id("<s>")
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", start)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token=eos, chat_template=chat_template
    )
