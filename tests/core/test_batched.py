"""Many matrices at once: as good as one at a time, and what is too hard for a batch is left alone."""

import threading

import pytest
import torch
from spectra import edge, exact, pair, projector_error
from torch import Tensor

from lox_hf.core import batched
from lox_hf.core.batched import batch_bytes, batched_lanczos, orthonormal_blocks
from lox_hf.core.delta import Delta
from lox_hf.core.lowrank import decompose, fits
from lox_hf.core.precision import exact_products

NOISE = 1e-4
SHAPES = [(300, 200), (200, 300), (1024, 256), (256, 1024)]


def change(shape: tuple[int, int], factors: tuple[float, ...], *, noise: float = NOISE, seed: int = 0) -> Tensor:
    """dW of a bfloat16 pair with these singular values in units of the noise's largest."""
    values = [edge(shape, NOISE) * factor for factor in factors]
    aligned, base = pair(shape, values, noise=noise, seed=seed, dtype=torch.bfloat16)
    return aligned.float() - base.float()


def with_gap(shape: tuple[int, int], seed: int = 0) -> Tensor:
    return change(shape, (20, 16, 12, 10, 9, 8, 6.6, 6, 5), seed=seed)


def noise_alone(shape: tuple[int, int], seed: int = 0) -> Tensor:
    return change(shape, (0.0,), seed=seed)


@pytest.mark.parametrize("shape", SHAPES)
def test_each_is_that_of_the_exact_svd_and_of_one_matrix_alone(shape: tuple[int, int]) -> None:
    deltas = torch.stack([with_gap(shape, seed) for seed in range(5)])
    for delta, found in zip(deltas, batched_lanczos(deltas, 6), strict=True):
        assert found is not None and found.converged
        u, s, _ = exact(delta, torch.zeros_like(delta))
        alone = decompose(Delta(delta, torch.zeros_like(delta)), 6)
        assert projector_error(found.u, u[:, :6]) < 1e-4
        assert projector_error(found.u, alone.factors.U) < 1e-4
        assert torch.allclose(found.s.double(), s[:6], rtol=1e-5)
        assert found.next_s == pytest.approx(alone.next_s, rel=0.02)  # an estimate from below
        assert found.energy == pytest.approx(alone.energy, rel=1e-6)
        assert projector_error(found.u, u[:, 1:7]) > 0.9  # control: neighbouring directions are told apart


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("k", [1, 6, 20])
def test_residual_is_what_it_claims(shape: tuple[int, int], k: int) -> None:
    deltas = torch.stack([with_gap(shape), noise_alone(shape), with_gap(shape, 1)])
    for delta, found in zip(deltas.double(), batched_lanczos(deltas, k), strict=True):
        assert found is not None
        u, s, vh = found.u.double(), found.s.double(), found.vh.double()
        right = (delta.T @ u - vh.T * s).norm() / s.norm()
        left = (delta @ vh.T - u * s).norm() / s.norm()
        assert found.residual <= 1e-4
        assert max(left, right) <= found.residual + 1e-6  # the certificate, and what float32 adds to it
        assert max((u.T @ u - torch.eye(k)).abs().max(), (vh @ vh.T - torch.eye(k)).abs().max()) < 1e-6


def test_a_few_slow_ones_go_on_alone_and_through_a_restart() -> None:
    shape = (1024, 256)
    deltas = torch.stack([with_gap(shape), noise_alone(shape), with_gap(shape, 1), with_gap(shape, 2)])
    found = batched_lanczos(deltas, 6)
    steps = [item.steps if item else 0 for item in found]
    assert max(steps[0], *steps[2:]) < batched.BASIS_BLOCKS < steps[1]  # the slow one, when the others were let go
    slow = found[1]
    assert slow is not None
    best = torch.linalg.svdvals(deltas[1].double())[:6].square().sum().item()
    assert slow.s.double().square().sum().item() == pytest.approx(best, rel=1e-6)
    alone = batched_lanczos(deltas[1:2], 6)[0]
    assert alone is not None and torch.allclose(alone.s, slow.s, rtol=1e-6)  # company changes nothing


@pytest.mark.parametrize("rank", [6, 10, 16])
def test_exactly_low_rank_changes_have_full_bases(rank: int) -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(300, rank, generator=generator), torch.randn(rank, 200, generator=generator)
    rows = torch.zeros(300, 200)
    rows[:rank] = torch.randn(rank, 200, generator=generator)  # a few rows changed, all others are exactly zero
    for delta, found in zip((left @ right, rows), batched_lanczos(torch.stack([left @ right, rows]), 6), strict=True):
        u, s, _ = exact(delta, torch.zeros_like(delta))
        assert found is not None
        assert torch.allclose(found.s.double(), s[:6], rtol=1e-6)
        assert projector_error(found.u, u[:, :6]) < 1e-4


def test_what_is_too_hard_is_left_alone_and_harms_nobody() -> None:
    shape = (600, 400)
    wide = change(shape, (5000, 500, 100, 50, 10, 5, 2))
    few = change(shape, (9, 8), noise=0.0).float()
    huge = with_gap(shape) * 1e22  # finite, but its square is not
    broken = with_gap(shape)
    broken[3, 4] = torch.nan
    deltas = torch.stack([with_gap(shape), wide, broken, torch.zeros(shape), huge, few])
    first, *others = batched_lanczos(deltas, 6)
    alone = batched_lanczos(deltas[:1], 6)[0]
    assert first is not None and alone is not None and torch.allclose(first.s, alone.s, rtol=1e-6)
    assert others[0] is None and others[1] is None and others[3] is None
    zero = others[2]
    assert zero is not None and len(zero.s) == 0 and zero.energy == 0
    assert zero.u.shape == (600, 0) and zero.vh.shape == (0, 400)


def test_a_spectrum_over_three_orders_is_found_alone_and_harms_nobody() -> None:
    aligned, base = pair((600, 400), torch.logspace(0, -3, 6).tolist())
    hard = aligned - base
    easy = with_gap((600, 400))
    first, second = batched_lanczos(torch.stack([hard, easy]), 6)
    assert first is None and second is not None  # float32 does not resolve the last ones beside the first
    u, s, _ = exact(aligned, base)
    assert s[6] < 1e-3 * s[5] < 1e-5 * s[0]  # control: six directions, and a wide spectrum
    found = decompose(Delta(aligned, base), 6)
    assert torch.allclose(found.factors.S.double(), s[:6], rtol=1e-4)
    assert projector_error(found.factors.U, u[:, :6]) < 1e-3


@pytest.mark.parametrize("at_the_end", [False, True])
def test_one_that_lapack_gives_up_is_left_alone(at_the_end: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    first, large, last = (with_gap((300, 200), seed) for seed in range(3))
    deltas = torch.stack([first, 128 * large, last])
    wanted = batched_lanczos(deltas, 6)
    solve, mark, asked = torch.linalg.eigh, 10 * first.square().sum(), list[int]()

    def give_up(matrices: Tensor) -> tuple[Tensor, Tensor]:
        """Fail for the one matrix whose trace is that large: which finite ones LAPACK gives up is its own affair."""
        hit = matrices.diagonal(dim1=1, dim2=2).sum(dim=1) > mark
        if hit.any() and (matrices.shape[1] == 6) == at_the_end:
            asked.append(len(matrices))
            raise torch.linalg.LinAlgError("did not converge")
        return solve(matrices)

    monkeypatch.setattr(torch.linalg, "eigh", give_up)
    found = batched_lanczos(deltas, 6)
    assert wanted[1] is not None and found[1] is None
    assert asked[-1] == 1 and len(asked) <= 2  # with others, then alone, and never again
    for number in (0, 2):
        one, other = wanted[number], found[number]
        assert one is not None and other is not None and torch.allclose(one.s, other.s, rtol=1e-6)


def test_threads_are_set_back_when_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Tensor) -> None:
        raise MemoryError

    numbers: list[int] = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(torch, "set_num_threads", numbers.append)
    monkeypatch.setattr(torch.linalg, "eigh", fail)
    before = threading.active_count()
    with pytest.raises(MemoryError):
        batched_lanczos(with_gap((300, 200))[None], 6)
    assert threading.active_count() == before
    assert numbers == [1, 3]  # in the thread that solves, and at the end


def test_threads_are_started_once_for_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    pools: list[batched.ThreadPoolExecutor] = []
    make = batched.ThreadPoolExecutor
    monkeypatch.setattr(
        batched, "ThreadPoolExecutor", lambda *args, **settings: pools.append(make(*args, **settings)) or pools[-1]
    )
    found = batched_lanczos(noise_alone((300, 200))[None], 6)
    assert len(pools) == 1 and found[0] is not None and found[0].steps > batched.FIRST_TEST


@pytest.mark.parametrize("default", ["meta", torch.bfloat16], ids=["device", "dtype"])
def test_defaults_for_new_tensors_change_nothing(default: str | torch.dtype) -> None:
    deltas = with_gap((300, 200))[None]
    wanted = batched_lanczos(deltas, 6)[0]
    try:
        if isinstance(default, torch.dtype):
            torch.set_default_dtype(default)
        else:
            torch.set_default_device(default)
        found = batched_lanczos(deltas, 6)[0]
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert wanted is not None and found is not None and torch.equal(found.u, wanted.u)


def test_what_does_not_converge_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batched, "MAX_STEPS", 4)
    deltas = torch.stack([with_gap((300, 200)), noise_alone((300, 200))])
    found = batched_lanczos(deltas, 6)
    assert found[0] is not None and found[1] is None


def test_seed_and_order_decide_nothing_else() -> None:
    deltas = torch.stack([with_gap((300, 200), seed) for seed in range(3)])
    once, again, other = (batched_lanczos(deltas, 6, seed=seed) for seed in (0, 0, 1))
    for one, two, three in zip(once, again, other, strict=True):
        assert one is not None and two is not None and three is not None
        assert torch.equal(one.u, two.u) and not torch.equal(one.u, three.u)
        assert projector_error(one.u, three.u) < 1e-4


def test_blocks_of_any_condition_become_orthonormal() -> None:
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randn(4, 16, 200, generator=generator, dtype=torch.float64)
    blocks[1, 8:] = 1e-8 * blocks[1, 8:] + blocks[1, :8]  # nearly of rank 8
    blocks[2] *= torch.logspace(0, -6, 16, dtype=torch.float64)[:, None]
    bases, inverse = orthonormal_blocks(blocks, rounds=3)
    assert (torch.bmm(bases, bases.mT) - torch.eye(16)).abs().max() < 2 * 16 * batched.SHIFT  # the last round's shift
    assert torch.allclose(torch.bmm(inverse, blocks), bases, atol=1e-6)  # the same span


def test_rule_is_that_of_one_matrix() -> None:
    for shape, k in [((300, 200), 6), ((64, 4096), 6), ((200, 127), 20), ((300, 70), 6), ((65, 65), 6)]:
        method = decompose(Delta(torch.randn(shape), torch.zeros(shape)), k).method
        assert fits(shape, k, "auto") == (method == "lanczos"), (shape, k)
    assert not fits((300, 200), 6, "exact")
    assert batch_bytes((4096, 4096), 6) >= 8 * 4096 * 4096  # the whole, and the halves that are cut from it


def test_precision_and_autocast_are_set_back() -> None:
    deltas = with_gap((300, 200))[None]
    wanted = batched_lanczos(deltas, 6)[0]
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", torch.bfloat16):
            found = batched_lanczos(deltas, 6)[0]
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16  # control: autocast is on
        assert torch.get_float32_matmul_precision() == "medium"
        assert wanted is not None and found is not None and torch.equal(found.u, wanted.u)
        with pytest.raises(RuntimeError), exact_products():
            raise RuntimeError
        assert torch.get_float32_matmul_precision() == "medium" and torch.backends.cuda.matmul.allow_tf32
        with exact_products():
            assert torch.backends.cuda.matmul.fp32_precision == torch.backends.mkldnn.matmul.fp32_precision == "ieee"
    finally:
        torch.set_float32_matmul_precision(before)
