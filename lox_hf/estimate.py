"""What hardening will take, before it is done: bytes, memory, and seconds from a probe of this machine."""

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lox_hf.config import LoxConfig
from lox_hf.core.lanczos import block_size
from lox_hf.core.lowrank import fits
from lox_hf.edit.tensor import BaseFactors, edit_tensor
from lox_hf.parallel.threads import map_tensors
from lox_hf.records import HardeningEstimate, HardeningPlan, TensorPlan
from lox_hf.weights.scaled import scale_name
from lox_hf.weights.selection import matrix_shape
from lox_hf.weights.source import DictSource

STEP_ROWS = 512
"""A step of block Lanczos costs as if the matrix had so many rows more: its block is made orthogonal (fitted)."""
FEW_STEPS, MANY_STEPS = 6, 16
"""Passes at r up to 8 and above: the change of a real model has a few directions that stand out (measured)."""
SHARE_RANK = 32
"""Rank that an energy share is taken for: how many directions it needs is known only afterwards."""
WRITING_PASSES = 0.6
"""Passes that forming, rounding and handing on an entry takes (measured)."""
EXACT_PASSES = 0.2
"""Passes of block Lanczos that LAPACK's SVD takes for each entry and each of its smaller side (measured)."""
FLOAT8_PASSES = 1.65
"""Passes that one over a float8 matrix takes, which is turned into float32 on the way (measured: 1.6 and 1.7)."""
MOVING_PASSES = 0.3
"""Passes that reading and writing one byte of a file in the page cache takes for each entry of it (measured)."""

MIB = 2**20
PROCESS_BYTES = 156 * MIB
"""A process that has imported torch and opened its files (measured)."""
FLOAT8_BYTES = 39 * MIB
"""What torch imports the first time that float8 is read with its scales: sympy, for any tensor subclass (measured)."""
THREAD_BYTES = 20 * MIB
"""Tiles, Krylov basis and products of one thread, which have a budget of their own (measured)."""
TENSOR_BYTES = 8 * 1024
"""Plan, place in the files and report of a tensor (measured)."""

PROBE_SHAPE, EXACT_PROBE_SHAPE = (2048, 4096), (512, 512)
PROBE_RANK = 64
"""The largest rank that is probed: it takes about a second."""
PROBE_S = 0.5
DIRECTIONS, SIGNAL, NOISE = 16, 5.0, 1e-4
"""The synthetic change, as in benchmarks/README.md: 6 directions hold 4 to 15 % of its energy, as in the paper."""


def estimate(
    plan: HardeningPlan, config: LoxConfig, *, num_workers: int | None = None, processes: int = 1
) -> HardeningEstimate:
    """Estimate what a plan takes on this machine's CPU; its speed is measured for about a second.

    The plan knows the aligned model's dtypes: of the base as many bytes are counted, whatever it is stored in.

    Args:
        plan: What will be done.
        config: How matrices are decomposed.
        num_workers: Threads of each process; None takes torch's number of threads.
        processes: Processes that share the work; all of them are to call this at once, so that they slow each other
            as they will in the work.

    Returns:
        Bytes, memory and time.

    Example:
        >>> from lox_hf import ModelReference
        >>> tensor = TensorPlan("q_proj.weight", (4096, 4096), "bfloat16", 6, 1.25, True, "target")
        >>> plan = HardeningPlan(ModelReference("a"), ModelReference("b"), "config", (tensor,), 2 * 4096**2)
        >>> found = estimate(plan, LoxConfig("b"))
        >>> found.read_bytes, found.write_bytes
        (67108864, 33554432)
    """
    threads = num_workers or torch.get_num_threads()
    known = plan.base_found_in == "subspace"  # directions that need no decomposition
    work = [replace(tensor, r=None) if known else tensor for tensor in plan.tensors]
    costs = [cost(tensor, config.svd) for tensor in work]
    pass_s = _probe(max(work, key=lambda tensor: cost(tensor, config.svd)), config, threads)
    read = plan.total_bytes + (0 if known else sum(map(size_bytes, plan.edited)))
    return HardeningEstimate(
        read_bytes=read,
        write_bytes=plan.total_bytes,
        memory_bytes=_memory_bytes(work, config.svd, threads),
        threads=threads,
        processes=processes,
        work_s=pass_s * longest_share(costs, threads * processes),
    )


def cost(plan: TensorPlan, svd: str = "auto") -> float:
    """Work on one tensor, in entries that a pass of block Lanczos with its narrowest block reads in the same time.

    Args:
        plan: What is done to it.
        svd: How it is decomposed: "auto" or "exact".

    Returns:
        The cost, positive for a tensor that is not empty.

    Example:
        >>> edited = TensorPlan("q_proj.weight", (4096, 4096), "bfloat16", 6, 1.25, True, "target")
        >>> cost(edited) > 5 * cost(replace(edited, edit=False))
        True
    """
    return _computing(plan, svd) + MOVING_PASSES * size_bytes(plan)


def longest_share(costs: Sequence[float], workers: int) -> float:
    """Cost of the share that ends last: an even one, or that with the heaviest tensor, which one worker does alone.

    Args:
        costs: Cost of each tensor.
        workers: Threads of all processes.

    Returns:
        The cost.
    """
    return max(sum(costs) / workers, max(costs))


def size_bytes(plan: TensorPlan) -> int:
    """Bytes of the tensor in its file; one byte an element where torch does not know the format."""
    return math.prod(plan.shape) * getattr(getattr(torch, plan.dtype, None), "itemsize", 1)


def _computing(plan: TensorPlan, svd: str) -> float:
    """The part of the cost that is arithmetic."""
    if not plan.edit:
        return 0.0
    count, rows, columns = matrix_shape(plan.shape)
    reading = FLOAT8_PASSES if _is_float8(plan) else 1.0
    writing = WRITING_PASSES * reading * count * rows * columns
    if plan.r is None:
        return writing
    k, smaller = _rank(plan), min(rows, columns)
    if _is_exact(plan, svd):
        return writing + EXACT_PASSES * count * rows * columns * smaller
    passes = reading * (FEW_STEPS if k <= 8 else MANY_STEPS) * block_size(k) / 16
    return writing + passes * count * (rows + STEP_ROWS) * columns


def _rank(plan: TensorPlan) -> int:
    smaller = min(matrix_shape(plan.shape)[1:])
    return min(plan.r if isinstance(plan.r, int) else SHARE_RANK, smaller)


def _is_float8(plan: TensorPlan) -> bool:
    return plan.dtype.startswith("float8")


def _is_exact(plan: TensorPlan, svd: str) -> bool:
    return not fits(matrix_shape(plan.shape)[1:], _rank(plan), svd)


def _memory_bytes(plans: list[TensorPlan], svd: str, threads: int) -> int:
    """Anonymous memory of a process: its own, what each tensor is known by, and what each thread works in."""
    shapes = {plan.name: plan.shape for plan in plans}
    at_work = max(_working_bytes(plan, svd) + _rounding_bytes(plan, shapes) for plan in plans)
    process = PROCESS_BYTES + FLOAT8_BYTES * any(plan.edit and _is_float8(plan) for plan in plans)
    return process + TENSOR_BYTES * len(plans) + threads * (THREAD_BYTES + at_work)


def _working_bytes(plan: TensorPlan, svd: str) -> int:
    """What grows with the matrix: dW itself and its SVD where that is exact, else blocks and directions."""
    if not plan.edit or plan.r is None:
        return 0
    _, rows, columns = matrix_shape(plan.shape)
    k = _rank(plan)
    if _is_exact(plan, svd):
        return 32 * rows * columns
    return 48 * block_size(k) * columns + 28 * k * (rows + columns)


def _rounding_bytes(plan: TensorPlan, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Rows in float32 and rounded to float8: whole blocks of one scale, of which the largest number decides."""
    if not plan.edit or not _is_float8(plan):
        return 0
    _, rows, columns = matrix_shape(plan.shape)
    grid = shapes.get(scale_name(plan.name, shapes), ())
    blocks_down = grid[-2] if len(grid) == len(plan.shape) else 1  # no scales, or one of the whole tensor
    return 5 * -(-rows // blocks_down) * columns


def _probe(heaviest: TensorPlan, config: LoxConfig, threads: int) -> float:
    """Seconds that a pass takes for an entry on one of `threads` threads while all of them work."""
    is_exact = heaviest.edit and heaviest.r is not None and _is_exact(heaviest, config.svd)
    r = None if heaviest.r is None else min(_rank(heaviest), PROBE_RANK)
    shape = EXACT_PROBE_SHAPE if is_exact else PROBE_SHAPE
    probe = TensorPlan("probe", shape, "bfloat16", r, 1.0, True, "probe")
    svd = "exact" if is_exact else "auto"
    aligned, base = _synthetic_pair(*shape)
    factors = BaseFactors(DictSource({"probe": base}, "probe"), replace(config, svd=svd), None)

    def once() -> float:
        started = time.perf_counter()
        edit_tensor(probe, aligned, factors, lambda *_: None)
        return time.perf_counter() - started

    def work(_: int) -> float:
        end, best = time.perf_counter() + PROBE_S, once()
        while time.perf_counter() < end:
            best = min(best, once())  # the first is slow, and another may meet what else runs here
        return best

    seconds = map_tensors(work, range(threads), size_of=lambda _: 1, num_workers=threads, progressbar=False)
    return statistics.mean(seconds) / _computing(probe, svd)


def _synthetic_pair(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """A base and what alignment makes of it: a few directions that stand out of noise, in bfloat16."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    base = (0.02 * noise(rows, columns)).bfloat16()
    directions = noise(rows, DIRECTIONS) / torch.arange(1, DIRECTIONS + 1).pow(0.7) @ noise(DIRECTIONS, columns)
    change = NOISE * (noise(rows, columns) + SIGNAL * (rows**-0.5 + columns**-0.5) * directions)
    return (base.float() + change).bfloat16(), base
