"""The run: it is resumable at any moment, judges again without generating again, and keeps what it has."""

import json
import multiprocessing
import random
import signal
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import run_program
from endpoint_server import EndpointServer
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from lox_hf import LoxConfig, SafetyReport, apply_lox, evaluate_safety
from lox_hf.demo.training import new_model
from lox_hf.demo.world import build_tokenizer, held_out_prompts
from lox_hf.errors import ConfigError, EndpointError, OutputError
from lox_hf.evaluation.data.prompts import Prompt
from lox_hf.evaluation.judges.function import FunctionJudge
from lox_hf.evaluation.judges.refusal import RefusalJudge
from lox_hf.evaluation.models.chat import Conversation, Reply
from lox_hf.evaluation.safety import run_judges
from lox_hf.records import SafetyComparison, SafetyRun, Verdict
from lox_hf.run_folder import RUN_NAME

KILLS = 5
PROMPTS = held_out_prompts()[100:160]


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return new_model(build_tokenizer(), 0).eval()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


class Scripted:
    """A chat model whose answers are known; it counts what it is asked, and can fail."""

    name = "scripted"

    def __init__(self, fail_at: int | None = None, silent: Collection[int] = (), **settings: Any) -> None:
        self.fail_at, self.silent, self.asked, self.own_settings = fail_at, silent, 0, settings

    def settings(self) -> dict[str, Any]:
        return dict(self.own_settings)

    def replies(
        self, conversations: Sequence[Conversation], done: Collection[int] = ()
    ) -> Iterator[tuple[int, Reply]]:
        skip = set(done)
        for position in (position for position in range(len(conversations)) if position not in skip):
            if position == self.fail_at:
                raise EndpointError("the server is gone")
            self.asked += 1
            if position in self.silent:
                yield position, Reply("", error="no answer within 1 s", transient=True)
            else:
                yield (
                    position,
                    Reply("Sorry, I can't help with that." if position % 2 else f"Turn it {position} times."),
                )


class Failing:
    name, tells_refusals, reads_prompts, durable = "failing", False, True, True

    def __init__(self, limit: int) -> None:
        self.limit, self.asked = limit, 0

    def settings(self) -> dict[str, Any]:
        return {}

    def verdicts(
        self, prompts: Sequence[str], responses: Sequence[str], done: Collection[int] = ()
    ) -> Iterator[tuple[int, Verdict]]:
        for position in (position for position in range(len(prompts)) if position not in set(done)):
            if position == self.limit:
                raise EndpointError("the judge is gone")
            self.asked += 1
            yield position, Verdict("complied", score=5)


def texts(n: int) -> list[str]:
    return [f"How do I turn number {number}?" for number in range(n)]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_on_a_real_model(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    report = evaluate_safety(model, tokenizer, PROMPTS, output_dir=tmp_path / "run", max_new_tokens=8)
    assert report.asr.n == sum(prompt.harmful for prompt in PROMPTS) and report.over_refusal.n + report.asr.n == 60
    assert SafetyReport.from_json((tmp_path / "run" / "report.json").read_text()) == report
    page = (tmp_path / "run" / "report.md").read_text()
    assert "attack success rate" in page and PROMPTS[0].text not in page
    assert sorted(line["position"] for line in lines(tmp_path / "run" / "generations.jsonl")) == list(range(60))
    (verdicts,) = (tmp_path / "run").glob("verdicts.refusal-*.jsonl")
    assert sorted(line["position"] for line in lines(verdicts)) == list(range(60))
    assert (report.generation["template"], report.generation["max_new_tokens"]) == ("chat", 8)
    in_memory = evaluate_safety(model, tokenizer, PROMPTS, max_new_tokens=8)
    assert in_memory == report


def test_a_model_that_was_edited_is_another_run(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    base, edited = new_model(tokenizer, 1), new_model(tokenizer, 0)
    evaluate_safety(edited, tokenizer, PROMPTS[:4], output_dir=tmp_path / "run", max_new_tokens=2)
    again = evaluate_safety(edited, tokenizer, PROMPTS[:4], output_dir=tmp_path / "run", max_new_tokens=2)
    assert again.asr.n == 4  # control: the same model goes on
    apply_lox(edited, LoxConfig(r=1, alpha=0.5), base_model=base, progressbar=False)
    with pytest.raises(OutputError, match="the weights: another model's"):
        evaluate_safety(edited, tokenizer, PROMPTS[:4], output_dir=tmp_path / "run", max_new_tokens=2)


def test_another_judge_needs_no_new_answers(tmp_path: Path) -> None:
    chat = Scripted()
    first = evaluate_safety(chat, None, texts(10), output_dir=tmp_path)
    assert (chat.asked, first.asr.count) == (10, 5)
    always = FunctionJudge(lambda prompts, responses: [True] * len(responses))
    assert evaluate_safety(chat, None, texts(10), always, output_dir=tmp_path).asr.count == 10
    assert chat.asked == 10
    assert len(list(tmp_path.glob("verdicts.*.jsonl"))) == 2


def test_two_judges_give_their_agreement(tmp_path: Path) -> None:
    always = FunctionJudge(lambda prompts, responses: [True] * len(responses))
    prompts = [Prompt(text) for text in texts(10)]
    run = run_judges(Scripted(), prompts, [RefusalJudge(), always], output_dir=tmp_path)
    reports, (found,) = run.reports, run.agreements
    assert [report.asr.count for report in reports] == [5, 10]
    assert (found.judges, found.both_complied, found.only_second, found.kappa) == (
        ("refusal", "function:<lambda>"),
        5,
        5,
        0.0,
    )
    assert SafetyReport.from_json((tmp_path / "report.json").read_text()) == reports[0]
    (other,) = tmp_path.glob("report.function*.json")
    assert SafetyReport.from_json(other.read_text()) == reports[1]
    assert "Cohen's kappa" in (tmp_path / "report.md").read_text()


def test_what_was_answered_before_a_failure_is_kept(tmp_path: Path) -> None:
    broken = Scripted(fail_at=6)
    with pytest.raises(EndpointError, match="gone"):
        evaluate_safety(broken, None, texts(10), output_dir=tmp_path)
    assert broken.asked == 6 and len(lines(tmp_path / "generations.jsonl")) == 6
    mended = Scripted()
    report = evaluate_safety(mended, None, texts(10), output_dir=tmp_path)
    assert mended.asked == 4
    assert report == evaluate_safety(Scripted(), None, texts(10))


def test_verdicts_before_a_failure_are_kept_and_not_paid_twice(tmp_path: Path) -> None:
    with pytest.raises(EndpointError):
        evaluate_safety(Scripted(), None, texts(10), Failing(7), output_dir=tmp_path)
    judge = Failing(99)
    assert evaluate_safety(Scripted(), None, texts(10), judge, output_dir=tmp_path).asr.count == 10
    assert judge.asked == 3


def test_a_prompt_without_an_answer_is_unscored_and_asked_again(tmp_path: Path) -> None:
    report = evaluate_safety(Scripted(silent={2, 3}), None, texts(6), output_dir=tmp_path)
    assert (report.asr.n, report.asr.unscored) == (4, 2)
    assert report.unscored_reasons == {"no response: no answer within 1 s": 2}
    again = Scripted()
    assert evaluate_safety(again, None, texts(6), output_dir=tmp_path).asr.unscored == 0
    assert again.asked == 2


def test_a_function_is_asked_again_and_so_are_phrases(tmp_path: Path) -> None:
    for verdict in (True, False):  # another function of the same name
        report = evaluate_safety(Scripted(), None, texts(4), lambda p, r, v=verdict: [v] * 4, output_dir=tmp_path)
        assert report.asr.count == 4 * verdict
    (journal,) = tmp_path.glob("verdicts.function*.jsonl")
    assert [line["label"] for line in lines(journal)] == ["refused"] * 4


def test_verdicts_on_harmless_prompts_are_phrases_and_always_new(tmp_path: Path) -> None:
    prompts = [Prompt("h"), Prompt("s", harmful=False)]
    judge = Failing(99)
    assert evaluate_safety(Scripted(), None, prompts, judge, output_dir=tmp_path).over_refusal.count == 1
    (journal,) = tmp_path.glob("verdicts.failing*.harmless.jsonl")
    journal.write_text(journal.read_text().replace("refused", "complied"))  # as an older version may have judged
    assert evaluate_safety(Scripted(), None, prompts, judge, output_dir=tmp_path).over_refusal.count == 1
    assert judge.asked == 1


def test_settings_of_a_loaded_model_are_refused_for_another(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has its own max_new_tokens, batch_size"):
        evaluate_safety(Scripted(), None, texts(1), max_new_tokens=500, batch_size=2)


def test_a_judge_that_fails_does_not_cost_the_report_of_the_one_before(tmp_path: Path) -> None:
    prompts = [Prompt(text) for text in texts(4)]
    with pytest.raises(EndpointError):
        run_judges(Scripted(), prompts, [RefusalJudge(), Failing(0)], output_dir=tmp_path)
    assert SafetyReport.from_json((tmp_path / "report.json").read_text()).asr.n == 4


def test_an_earlier_run_is_compared_with_on_disk_too(tmp_path: Path) -> None:
    before = evaluate_safety(Scripted(), None, texts(4))
    prompts = [Prompt(text) for text in texts(4)]
    run = run_judges(Scripted(silent={0}), prompts, [RefusalJudge()], output_dir=tmp_path, compare_with=before)
    assert run.comparison is not None and run.comparison.asr.before.n == 3
    assert SafetyComparison.from_json((tmp_path / "comparison.json").read_text()) == run.comparison
    assert "Against the earlier run" in (tmp_path / "report.md").read_text()
    assert SafetyRun.from_json(run.to_json()) == run
    asked = Scripted()
    with pytest.raises(ConfigError, match="no prompt in common"):
        run_judges(asked, [Prompt("other")], [RefusalJudge()], compare_with=before)
    assert asked.asked == 0


def test_known_answers_of_unanswered_prompts_are_unscored() -> None:
    prompts = [Prompt(text, harmful=False, reference="turn it") for text in texts(4)]
    report = evaluate_safety(Scripted(silent={0}), None, prompts)
    assert (report.accuracy.count, report.accuracy.n, report.accuracy.unscored) == (1, 3, 1)


def test_other_settings_and_other_prompts_are_refused(tmp_path: Path) -> None:
    evaluate_safety(Scripted(tokens=60), None, texts(3), output_dir=tmp_path)
    with pytest.raises(OutputError, match="tokens: 60 there, 61 now"):
        evaluate_safety(Scripted(tokens=61), None, texts(3), output_dir=tmp_path)
    with pytest.raises(OutputError, match="prompts: "):
        evaluate_safety(Scripted(tokens=60), None, texts(4), output_dir=tmp_path)
    with pytest.raises(OutputError, match=r"system_prompt: None there, 'Be kind\.' now"):
        evaluate_safety(Scripted(tokens=60), None, texts(3), output_dir=tmp_path, system_prompt="Be kind.")


def test_n_takes_the_first(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(texts(9)))
    for prompts in (texts(9), tmp_path / "prompts.txt"):
        assert evaluate_safety(Scripted(), None, prompts, n=4).asr.n == 4
    with pytest.raises(ConfigError, match="n is 0"):
        evaluate_safety(Scripted(), None, texts(9), n=0)


def test_a_tokenizer_where_none_is_needed_and_none_where_one_is(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(ConfigError, match="needs no tokenizer"):
        evaluate_safety(Scripted(), tokenizer, texts(1))
    with pytest.raises(ConfigError, match="needs its tokenizer"):
        evaluate_safety(model, None, texts(1))


@pytest.fixture(scope="module")
def start() -> Iterator[Callable[..., Any]]:
    """Starts a run in a process of its own; transformers is imported once and not in every one."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["run_program", "lox_hf.evaluation.models.local", "transformers.models.llama", "openai"]
    )

    def start(*arguments: object) -> Any:
        process = context.Process(target=run_program.measure, args=arguments)
        process.start()
        return process

    yield start


def lines_on_disk(output: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in output.glob("*.jsonl"))


def test_killed_at_random_moments_it_ends_with_the_same_report(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, start: Callable[..., Any]
) -> None:
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"{prompt.text}\n" for prompt in held_out_prompts()[:100]))

    def scores_by_length(body: Mapping[str, Any]) -> str:
        return json.dumps({"reason": "by its length", "score": 1 + len(str(body)) % 5})

    with EndpointServer(scores_by_length, latency_s=0.02) as judge:

        def run(output: Path, kill_at: int | None = None) -> int:
            """Run to the end, or kill as soon as so many answers and verdicts are on disk; return the exit code."""
            # A judge's batch may have passed the moment already: one more line at least, so that work is hit.
            moment = None if kill_at is None else max(kill_at, lines_on_disk(output) + 1)
            process = start(tmp_path / "model", prompts, output, judge.base_url)
            while process.is_alive() and (moment is None or lines_on_disk(output) < moment):
                time.sleep(0.001)
            if kill_at is not None:
                process.kill()
            process.join()
            return process.exitcode

        assert run(tmp_path / "whole") == 0
        asked = len(judge.requests)
        assert asked > 10  # control: there is something to judge
        kills = sorted(random.Random(0).sample(range(1, 100), KILLS - 2) + random.Random(0).sample(range(110, 190), 2))
        found = []
        for kill_at in kills:
            assert run(tmp_path / "killed", kill_at) == -signal.SIGKILL
            found.append(lines_on_disk(tmp_path / "killed"))
        # The control: all of them hit the work.
        assert found == sorted(set(found)) and found[-1] < lines_on_disk(tmp_path / "whole")
        assert run(tmp_path / "killed") == 0
        # What was in flight at a kill is asked again, and nothing else: two requests at a time.
        assert asked <= len(judge.requests) - asked <= asked + 2 * KILLS
    for name in ("report.json", "report.md", RUN_NAME):
        assert (tmp_path / "killed" / name).read_text() == (tmp_path / "whole" / name).read_text()
    for pattern in ("generations.jsonl", "verdicts.rubric*.jsonl"):
        whole, killed = (lines(next((tmp_path / folder).glob(pattern))) for folder in ("whole", "killed"))
        by_position = [sorted(found, key=lambda line: line["position"]) for found in (whole, killed)]
        assert by_position[0] == by_position[1] and len(by_position[0]) == 100
