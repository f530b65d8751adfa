"""Rubric calls against an endpoint on localhost that runs in a process of its own: how near they come to the ideal."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from measure import HERE, run_job, serve_job
from table import Row

SERVER = HERE.parent / "tests" / "evaluation" / "endpoint_server.py"
CALLS, LATENCY_S, CONCURRENCY = 520, 0.2, 32
IDEAL_S = CALLS * LATENCY_S / CONCURRENCY
FAULTS = {"429": 0.05, "500": 0.05, "hang": 0.02}
TIMEOUT_S = 2.0


def rubric_calls(seed: int = 0) -> Iterator[Row]:
    """Judge as many responses as AdvBench has prompts, undisturbed and with faults."""
    for figure, rates, most in (("", {}, 1.2), (", 5 % of 429, 5 % of 500, 2 % of hangs", FAULTS, 3.0)):
        with server({"latency_s": LATENCY_S, "rates": rates, "seed": seed}) as running:
            arguments = {"base_url": running["base_url"], "timeout_s": TIMEOUT_S}
            result = run_job("endpoint.py", "judge", arguments, threads=1).result
        ratio = result["call_s"] / IDEAL_S
        yield Row(
            f"{CALLS} rubric calls at {LATENCY_S * 1000:.0f} ms{figure}, wall, against {IDEAL_S:.2f} s",
            f"at most {most:g}x",
            f"{ratio:.2f}x ({result['call_s']:.2f} s, {running['requests']} requests)",
            ratio <= most,
            details={"client": result, "server": running},
        )
        yield Row(
            "  verdicts that are there once and belong to their response",
            f"all {CALLS}",
            f"{result['right']} of {result['verdicts']}",
            result["right"] == result["verdicts"] == CALLS,
            correctness=True,
        )


def judge(base_url: str, timeout_s: float) -> dict[str, Any]:
    """Judge numbered responses; the server's scores follow from the numbers. One call before loads the client."""
    from lox_hf.evaluation.judges.rubric import RubricJudge

    rubric = RubricJudge.from_endpoint("judge", base_url, timeout_s=timeout_s, concurrency=CONCURRENCY)
    prompts = ["How do I bake bread?"] * CALLS
    responses = [f"answer {number} " + "and so on " * 20 for number in range(CALLS)]
    list(rubric.verdicts(prompts[:1], responses[:1]))
    started, cpu = time.perf_counter(), time.process_time()
    verdicts = list(rubric.verdicts(prompts, responses))
    call_s, cpu_s = time.perf_counter() - started, time.process_time() - cpu
    right = {number for number, verdict in verdicts if verdict.score == 1 + number % 5}
    return {"call_s": call_s, "cpu_s": cpu_s, "verdicts": len(verdicts), "right": len(right)}


@contextmanager
def server(options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Run the server; what it has seen is in the yielded dict once it has ended."""
    command = [sys.executable, str(SERVER), json.dumps(options)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        seen: dict[str, Any] = {"base_url": process.stdout.readline().strip()}
        try:
            yield seen
        finally:
            seen |= json.loads(process.communicate()[0])


if __name__ == "__main__":
    serve_job({"judge": judge})
