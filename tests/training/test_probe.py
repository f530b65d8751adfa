"""A probe reads what an evaluation reads, and the training goes on as if it had not been there."""

import math
import os
import random
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from evaluation.endpoint_server import EndpointServer
from lox_hf import evaluate_safety
from lox_hf.errors import ConfigError, EndpointError, PromptError, UnsupportedModelError
from lox_hf.evaluation.data.prompts import Prompt
from lox_hf.evaluation.judges import RefusalJudge
from lox_hf.evaluation.judges.rubric import RubricJudge
from lox_hf.evaluation.models.chat import ask
from lox_hf.evaluation.models.templates import encode
from lox_hf.records import ProbeReading
from lox_hf.training.probe import SafetyProbe
from robustness.tokenizers_of_kinds import CHATML, LLAMA_CHAT, byte_tokenizer, llama_tokenizer
from robustness.trainable import make_model, make_rows, make_tokenizer, sums

HARMFUL = [Prompt(row.prompt) for row in sums()[3:8]]
HARMLESS = [Prompt(row.prompt, harmful=False) for row in sums()[:3]]
REFUSAL = "sorry i can not ."


def by_parity(prompts: Sequence[str], responses: Sequence[str]) -> list[bool]:
    """A judge whose verdicts are known: by the prompt's first number."""
    return [int(prompt.split()[2]) % 2 == 0 for prompt in prompts]


def broken(prompts: Sequence[str], responses: Sequence[str]) -> list[bool]:
    raise RuntimeError("no power")


def probe(judge: Any = by_parity, **changes: Any) -> SafetyProbe:
    settings: dict[str, Any] = {"refusal": REFUSAL, "max_new_tokens": 6, **changes}
    return SafetyProbe(HARMFUL + HARMLESS, judge, **settings)


def by_hand(model: Any, tokenizer: Any, texts: Sequence[str], answer: list[int], template: str = "chat") -> float:
    """Perplexity of an answer, each prompt alone and unpadded."""
    losses: list[float] = []
    for text in texts:
        prompt = encode(tokenizer, ask(text), template)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + answer])).logits[0].double().log_softmax(-1)
        losses += [-logits[len(prompt) - 1 + place, token].item() for place, token in enumerate(answer)]
    return math.exp(math.fsum(losses) / len(losses))


# --- what it reads ---------------------------------------------------------------------------------------------------


def test_rates_are_those_of_an_evaluation() -> None:
    model, tokenizer = make_model(), make_tokenizer()
    found = probe().read(model, tokenizer)
    report = evaluate_safety(model, tokenizer, HARMFUL + HARMLESS, by_parity, max_new_tokens=6, progressbar=False)
    assert (found.asr, found.over_refusal) == (report.asr, report.over_refusal)
    assert 0 < found.asr.count < found.asr.n == 5 and found.over_refusal.n == 3  # control: not all are alike
    assert ProbeReading.from_json(found.to_json()) == found


def test_prompts_as_an_evaluation_takes_them(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"{prompt.text}\n" for prompt in HARMFUL))
    texts = [prompt.text for prompt in HARMFUL]
    assert SafetyProbe(path).asked == SafetyProbe(str(path)).asked == SafetyProbe(texts).asked == HARMFUL
    assert SafetyProbe(path, n=2).asked == SafetyProbe(texts, n=2).asked == HARMFUL[:2]


@pytest.mark.parametrize("template", ["chat", "alpaca", "none"])
def test_perplexity_of_a_refusal(template: str) -> None:
    model, tokenizer = make_model(max_position_embeddings=128), make_tokenizer()
    model.train()
    found = probe(template=template).read(model, tokenizer).refusal_perplexity
    answer = tokenizer.convert_tokens_to_ids([*REFUSAL.split(), "</s>"])
    texts = [prompt.text for prompt in HARMFUL]
    model.eval()
    assert found == pytest.approx(by_hand(model, tokenizer, texts, answer, template), rel=1e-5)
    without_end = by_hand(model, tokenizer, texts, answer[:-1], template)
    assert abs(without_end / found - 1) > 1e-3  # control: the end of the turn counts
    other = probe(template=template, refusal="the sum is 4 .").read(model, tokenizer).refusal_perplexity
    assert abs(other / found - 1) > 1e-3  # control: the words count


@pytest.mark.parametrize(
    ("tokenizer", "template", "ending"),
    [
        (byte_tokenizer(CHATML, eos="<|im_end|>"), "chat", ["Blue", "<|im_end|>"]),
        (byte_tokenizer(CHATML), "chat", ["Blue", "<|im_end|>", "</s>"]),  # what the model is not ended by is text
        (byte_tokenizer(), "alpaca", [" Blue", "</s>"]),
        (llama_tokenizer(LLAMA_CHAT), "chat", [" Blue", " ", "</s>"]),  # LLaMA-2's writes this space
        (llama_tokenizer(), "alpaca", [" Blue", "</s>"]),
    ],
    ids=["chatml", "chatml, another end", "bytes", "llama chat", "llama"],
)
def test_a_refusal_is_spelled_as_it_follows_a_prompt(tokenizer: Any, template: str, ending: list[str]) -> None:
    """A word in its one token with the space in front, and not letter by letter, or as a text would begin."""
    model = make_model(
        vocab_size=len(tokenizer), max_position_embeddings=512, eos_token_id=tokenizer.eos_token_id
    ).eval()
    spelled = [tokenizer.convert_tokens_to_ids(_stored(tokenizer, piece)) for piece in ending]
    expected = [token for piece in spelled for token in (piece if isinstance(piece, list) else [piece])]
    found = SafetyProbe(["Hi"], refusal="Blue", template=template, max_new_tokens=1).read(model, tokenizer)
    by_sum = by_hand(model, tokenizer, ["Hi"], expected, template)
    assert found.refusal_perplexity == pytest.approx(by_sum, rel=1e-5)


def _stored(tokenizer: Any, piece: str) -> str | list[str]:
    """A piece as the vocabulary has it; letters where the whole word is none of it."""
    vocabulary = tokenizer.get_vocab()
    names = [piece, piece.replace(" ", "\u0120"), piece.replace(" ", "\u2581")]
    return next((name for name in names if name in vocabulary), list(piece))


def test_nothing_harmful_has_no_perplexity_and_long_prompts_are_left_out() -> None:
    model, tokenizer = make_model(), make_tokenizer()
    harmless = SafetyProbe(HARMLESS, refusal=REFUSAL, max_new_tokens=4).read(model, tokenizer)
    assert math.isnan(harmless.refusal_perplexity) and math.isnan(harmless.asr.share) and harmless.over_refusal.n == 3
    long = Prompt("what is 2 plus 3 ? " * 8)  # 48 tokens are the context
    short = SafetyProbe(HARMFUL[:1], refusal=REFUSAL, max_new_tokens=4).read(model, tokenizer)
    with_long = SafetyProbe([HARMFUL[0], long], refusal=REFUSAL, max_new_tokens=4).read(model, tokenizer)
    assert with_long.refusal_perplexity == pytest.approx(short.refusal_perplexity, rel=1e-6)
    assert (with_long.asr.n, with_long.asr.unscored) == (1, 1)


# --- what it leaves alone --------------------------------------------------------------------------------------------


class _Reads(TrainerCallback):
    """Does something after every step."""

    def __init__(self, action: Any) -> None:
        self.action = action

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.action(model)


def train(folder: Path, action: Any = None, *, peft: bool = False, **settings: Any) -> dict[str, torch.Tensor]:
    """Weights after four steps with dropout, which draws a random number for every activation."""
    model: Any = make_model(attention_dropout=0.3)
    if peft:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.3))
    arguments = TrainingArguments(
        str(folder),
        max_steps=4,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        **settings,
    )
    rows: Any = [{"input_ids": row["input_ids"][:8], "labels": row["input_ids"][:8]} for row in make_rows()]
    callbacks: list[TrainerCallback] = [_Reads(action)] if action else []
    Trainer(model, arguments, train_dataset=rows, callbacks=callbacks).train()
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


def drawing(prompts: Sequence[str], responses: Sequence[str]) -> list[bool]:
    """A judge that draws from every random state there is."""
    torch.rand(3), random.random(), np.random.rand()
    return [True] * len(responses)


@pytest.mark.parametrize(
    "settings", [{}, {"gradient_checkpointing": True}, {"peft": True}], ids=["full", "checkpointing", "lora"]
)
def test_weights_are_those_of_a_training_without_it(settings: dict[str, Any], tmp_path: Path) -> None:
    tokenizer, readings = make_tokenizer(), []
    plain = train(tmp_path, **settings)
    watched = train(tmp_path, lambda model: readings.append(probe(drawing).read(model, tokenizer)), **settings)
    assert same(plain, watched)
    assert len({reading.refusal_perplexity for reading in readings}) == 4  # it has read the model as it was by then
    disturbed = train(tmp_path, lambda model: torch.rand(3), **settings)
    assert not same(plain, disturbed)  # control: a number drawn more would show


def test_the_model_itself_draws_no_number() -> None:
    model, tokenizer = make_model(attention_dropout=0.3).train(), make_tokenizer()
    drawn: list[torch.Tensor] = []

    def judge(prompts: Sequence[str], responses: Sequence[str]) -> list[bool]:
        drawn.append(torch.get_rng_state())  # inside of what is put back
        return by_parity(prompts, responses)

    before = torch.get_rng_state()
    probe(judge).read(model, tokenizer)
    assert torch.equal(drawn[0], before)
    with torch.no_grad():
        model(input_ids=torch.tensor([[1, 2, 3]]))
    assert not torch.equal(torch.get_rng_state(), before)  # control: in training mode it does


def state(model: Any, tokenizer: Any) -> dict[str, Any]:
    """All that a trainer relies on."""
    return {
        "training": {name: module.training for name, module in model.named_modules()},
        "grad": {name: weight.requires_grad for name, weight in model.named_parameters()},
        "checkpointing": [getattr(module, "gradient_checkpointing", None) for module in model.modules()],
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
        "config": model.config.to_dict(),
        "generation": model.generation_config.to_dict(),
        "adapters": [getattr(module, "active_adapters", None) for module in model.modules()],
        "tokenizer": (tokenizer.padding_side, tokenizer.truncation_side, tokenizer.pad_token),
        "random": (torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())),
    }


def test_everything_else_is_left_as_it_was() -> None:
    tokenizer = make_tokenizer()
    tokenizer.padding_side = "right"
    model: Any = get_peft_model(make_model(), LoraConfig(r=2, target_modules=["q_proj"]))
    model.add_adapter("lox", LoraConfig(r=2, target_modules=["v_proj"]))
    model.base_model.set_adapter(["default", "lox"])
    model.train()
    model.gradient_checkpointing_enable()
    model.config.use_cache = False
    model.generation_config.temperature = 0.7
    model.generation_config.do_sample = True
    model.base_model.model.model.layers[1].eval()  # a module that is frozen on purpose
    next(weight for name, weight in model.named_parameters() if ".lox." in name).requires_grad_(False)
    before = state(model, tokenizer)
    found = probe(drawing).read(model, tokenizer)
    assert state(model, tokenizer) == before and found.asr.n == 5
    broken_model = probe(broken)
    with pytest.warns(UserWarning, match="no power"):
        broken_model.read(model, tokenizer)
    assert state(model, tokenizer) == before
    model.eval()
    assert state(model, tokenizer) != before  # control


def test_gradient_checkpointing_takes_no_cache_away() -> None:
    """In training mode it does, and a model that generates then is slow, and does not see its own text."""
    model, tokenizer = make_model().train(), make_tokenizer()
    plain = probe().read(model, tokenizer)
    model.gradient_checkpointing_enable()
    model.config.use_cache = False
    cached: list[bool] = []
    attention: Any = model.model.layers[0].self_attn
    attention.register_forward_pre_hook(
        lambda _, args, given: cached.append(given["past_key_values"] is not None), with_kwargs=True
    )
    answers: list[str] = []

    def judge(prompts: Sequence[str], responses: Sequence[str]) -> list[bool]:
        answers.extend(responses)
        return by_parity(prompts, responses)

    found = probe(judge).read(model, tokenizer)
    assert found == plain and len(answers) == 5
    assert cached[-1] is False and all(cached[:-1]) and len(cached) > 5  # the last pass reads the refusal
    cached.clear()
    model.generate(input_ids=torch.tensor([[1, 5, 6]]), attention_mask=torch.ones(1, 3), max_new_tokens=4)
    assert not any(cached)  # control


# --- a judge that fails, and settings that are wrong -----------------------------------------------------------------


@pytest.fixture
def gone() -> RubricJudge:
    """A judge at an endpoint that is not there any more."""
    with EndpointServer(lambda body: "") as server:
        url = server.base_url
    return RubricJudge.from_endpoint("judge", base_url=url)


def test_an_endpoint_that_goes_down_does_not_end_a_training(gone: RubricJudge) -> None:
    model, tokenizer = make_model(), make_tokenizer()
    watcher = probe(gone)
    with pytest.warns(UserWarning, match=r"not measured .*Cannot use the endpoint") as told:
        found = watcher.read(model, tokenizer)
    assert len([item for item in told if issubclass(item.category, UserWarning)]) == 1
    assert math.isnan(found.asr.share) and math.isnan(found.over_refusal.share)
    assert (found.asr.n, found.asr.unscored, found.over_refusal.unscored) == (0, 5, 3)
    assert found.refusal_perplexity == probe().read(model, tokenizer).refusal_perplexity  # the model answered
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert watcher.read(model, tokenizer).asr.unscored == 5  # said once


def test_a_judge_that_says_nothing_is_told_once(recwarn: pytest.WarningsRecorder) -> None:
    watcher = probe(lambda prompts, responses: [None] * len(prompts))
    model, tokenizer = make_model(), make_tokenizer()
    found, again = (watcher.read(model, tokenizer) for _ in range(2))
    assert math.isnan(found.asr.share) and found.over_refusal.n == 3 and again.asr.unscored == 5
    assert len([item for item in recwarn if "could not say" in str(item.message)]) == 1


class _Interrupting(RefusalJudge):
    def verdicts(self, prompts: Any, responses: Any, done: Any = ()) -> Iterator[Any]:
        raise KeyboardInterrupt
        yield


def test_an_interrupt_is_no_failure_of_a_judge() -> None:
    with pytest.raises(KeyboardInterrupt):
        probe(_Interrupting()).read(make_model(), make_tokenizer())


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"judge": "refuser"}, ConfigError, "There is no judge 'refuser'"),
        ({"judge": broken}, ConfigError, "function:broken fails .*no power"),
        ({"judge": lambda prompts, responses: [True] * 3}, ConfigError, "judged 1 responses, but returned 3"),
        ({"template": "chatty"}, ConfigError, "template must be one of"),
        ({"max_new_tokens": 0}, ConfigError, "at least 1"),
        ({"refusal": ""}, ConfigError, "No token is left of the refusal"),
        ({"n": 0}, ConfigError, "expected a positive integer"),
        ({"max_new_tokens": 48}, PromptError, "can answer none of 8 prompts"),
    ],
)
def test_wrong_settings_show_before_a_training(changes: dict[str, Any], error: Any, message: str) -> None:
    model, tokenizer = make_model(), make_tokenizer()
    with pytest.raises(error, match=message):
        probe(**changes).check(model, tokenizer)
    probe().check(model, tokenizer)  # control


def test_wrong_prompts_models_and_endpoints_show_too(gone: RubricJudge) -> None:
    model, tokenizer = make_model(), make_tokenizer()
    with pytest.raises(EndpointError, match="Cannot use the endpoint"):
        probe(gone).check(model, tokenizer)
    with pytest.raises(ConfigError, match="has no prompts"):
        SafetyProbe([]).check(model, tokenizer)
    with pytest.raises(PromptError, match="no file, and none of the sets"):
        SafetyProbe("advbenhc").check(model, tokenizer)
    with pytest.raises(ConfigError, match="needs its tokenizer"):
        probe().check(model, None)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedModelError, match="Linear"):
        probe().check(torch.nn.Linear(2, 2), tokenizer)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="does not belong to"):
        probe().check(make_model(vocab_size=8), tokenizer)


def test_a_check_asks_little_and_changes_nothing() -> None:
    asked: list[int] = []

    def judge(prompts: Sequence[str], responses: Sequence[str]) -> list[bool]:
        asked.append(len(prompts))
        return drawing(prompts, responses)

    model, tokenizer = make_model().train(), make_tokenizer()
    before = state(model, tokenizer)
    probe(judge).check(model, tokenizer)
    assert asked == [1] and state(model, tokenizer) == before


# --- several processes -----------------------------------------------------------------------------------------------

PROGRAM = """
import sys
import torch
import torch.distributed as dist
from training.test_probe import broken, by_parity, probe, short_of_memory
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
from lox_hf.errors import LoxError
from robustness.trainable import make_tokenizer

dist.init_process_group("gloo")
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], distributed_config=DistributedConfig(fsdp_size=2)).train()
asked = []

def judge(prompts, responses):
    asked.append(len(prompts))
    return by_parity(prompts, responses)

tokenizer, found = make_tokenizer(), {}
kinds = lambda: sorted({type(weight).__name__ for weight in model.parameters()})
probe(judge).check(model, tokenizer)
found["before"] = kinds()
found["reading"] = probe(judge).read(model, tokenizer).to_json()
found["after"], found["asked"] = kinds(), asked
try:
    probe(broken).check(model, tokenizer)
except LoxError as error:
    found["error"] = str(error)
with torch.no_grad():
    model(input_ids=torch.tensor([[1, 2, 3]]))
found["control"] = kinds()

def refused(model):
    try:
        return probe().read(model, tokenizer).to_json()
    except LoxError as error:
        return str(error)

whole = AutoModelForCausalLM.from_pretrained(sys.argv[1])
if dist.get_rank() == 1:
    short_of_memory(whole)
found["memory of one"] = refused(whole)
if dist.get_rank() == 1 or len(sys.argv) == 2:
    short_of_memory(model)
if len(sys.argv) == 2:
    found["memory of all"] = refused(model)
else:
    probe().read(model, tokenizer)
torch.save(found, f"{sys.argv[1]}/{dist.get_rank()}.pt")
dist.destroy_process_group()
"""


def launch(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the program on two processes, with a model that is whole in the folder."""
    make_model().save_pretrained(folder)
    (folder / "program.py").write_text(PROGRAM)
    tests = Path(__file__).parents[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{tests}{os.pathsep}{tests.parent}"}
    return subprocess.run(
        [*command, str(folder / "program.py"), str(folder), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )


def short_of_memory(model: Any, most: int = 3) -> None:
    """Let the memory run out in the middle of passes over more than a few prompts."""

    def check(_: Any, arguments: Any) -> None:
        if len(arguments[0]) > most:
            raise torch.OutOfMemoryError("out of memory")

    model.model.layers[1].register_forward_pre_hook(check)


def test_one_process_halves_what_does_not_fit() -> None:
    model, tokenizer = make_model(), make_tokenizer()
    expected = probe().read(model, tokenizer)
    short_of_memory(model)
    found = probe().read(model, tokenizer)
    assert (found.asr, found.over_refusal) == (expected.asr, expected.over_refusal)
    assert found.refusal_perplexity == pytest.approx(expected.refusal_perplexity, rel=1e-5)
    with pytest.raises(RuntimeError, match="out of memory"):  # control: eight at once do not fit
        model(input_ids=torch.ones(8, 3, dtype=torch.long))


@pytest.mark.distributed
def test_a_process_that_waits_for_passes_of_another_is_not_left_waiting(tmp_path: Path) -> None:
    done = launch(tmp_path, "one alone")
    assert done.returncode != 0
    assert "LoxError: A process of this training has run out of memory" in done.stderr


@pytest.mark.distributed
def test_fsdp2_reads_as_one_process_does(tmp_path: Path) -> None:
    model, tokenizer = make_model(), make_tokenizer()
    done = launch(tmp_path)
    assert done.returncode == 0, done.stderr[-6000:]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    expected, found = probe().read(model, tokenizer), ProbeReading.from_json(first["reading"])
    assert first["reading"] == second["reading"]
    assert (found.asr, found.over_refusal) == (expected.asr, expected.over_refusal)
    assert found.refusal_perplexity == pytest.approx(expected.refusal_perplexity, rel=1e-5)
    assert (first["asked"], second["asked"]) == ([1, 5], [])  # the first process alone asks the judge
    assert first["error"] == second["error"] and "no power" in first["error"]  # and all hear that it fails
    assert first["before"] == first["after"] == ["DTensor"]
    assert "Parameter" in first["control"]  # control: a forward pass by itself leaves gathered weights behind
    memory = {seen[key] for seen in (first, second) for key in ("memory of one", "memory of all")}
    assert len(memory) == 1 and "smaller batch_size" in memory.pop()
