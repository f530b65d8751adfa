"""The processes that `callback.py` measures: trainings with and without a `LoxCallback`, readings of known models."""

from __future__ import annotations

import gc
import hashlib
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from measure import HERE, anonymous_bytes, serve_job
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from lox_hf import LoxConfig, SafetySubspace
from lox_hf.records import DriftReading, TrainingReading
from lox_hf.training.backends import open_weights
from lox_hf.training.callback import LoxCallback
from lox_hf.training.monitor import DriftMonitor, read_drift

TESTS = HERE.parent / "tests"
R = 6
LARGE = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "vocab_size": 32000}
QUICK = {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 2, "vocab_size": 2000}
HEAD_SIZE = 64
SHARES = (0.0, 0.1, 0.5, 1.0)
SPREAD_STEPS = 4
ZERO_3 = {
    "train_micro_batch_size_per_gpu": "auto",
    "zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "torch_adam": True}},
    "zero_force_ds_cpu_optimizer": False,
}


def prepare(quick: bool, folder: str) -> dict[str, Any]:
    """Save the directions of the model that is trained."""
    model = _model(quick)
    SafetySubspace.from_models(model, _base_of(model), LoxConfig(r=R)).save_pretrained(folder)
    return {"parameters": sum(weight.numel() for weight in model.parameters())}


def coarse_pair(folder: str) -> dict[str, Any]:
    """Save a small pair in bfloat16 whose alignment is far larger than the steps of bfloat16."""
    model, paths = _model(quick=True), {side: str(Path(folder) / side) for side in ("aligned", "base")}
    base = _base_of(model)
    model.bfloat16().save_pretrained(paths["aligned"])
    model.load_state_dict(base)
    model.save_pretrained(paths["base"])
    return paths


def compare(quick: bool, subspace: str, rounds: int, steps: int, every: int, batch: tuple[int, int]) -> dict[str, Any]:
    """Train with and without the callback in turn, each time the same fresh model.

    One round more is trained first and left out: it pays for what is loaded late.
    """
    found: dict[str, list[Any]] = {"plain": [], "ours": []}
    weights = set()
    for turn in range(rounds + 1):
        for side in sorted(found, reverse=turn % 2 == 1):
            callback = LoxCallback(subspace, every_n_steps=every) if side == "ours" else None
            run, fingerprint = _timed_training(quick, steps, callback, batch)
            weights.add(fingerprint)
            found[side] += [run] if turn else []
            gc.collect()
    return {**found, "equal": len(weights) == 1}


def memory(quick: bool, subspace: str | None, steps: int) -> dict[str, Any]:
    """Train with a reading at every step, or without, and weigh this process after the last one."""
    callback = LoxCallback(subspace, every_n_steps=1) if subspace else None
    scale = _Scale()
    with tempfile.TemporaryDirectory() as folder:
        arguments = _arguments(folder, steps)
        trainer = _trainer(_model(quick), arguments, [*filter(None, [callback]), scale])
        started = time.monotonic()
        trainer.train()
    factors = _factor_bytes(callback.subspace) if callback else 0
    return {"started_s": started, "ended_s": scale.at_s, "factor_bytes": factors, **scale.found}


def erased(pair: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Take known shares of the safety component out, in float64, and read what is left in the dtype of training."""
    sys.path.insert(0, str(TESTS))
    import zoo
    from drift_oracle import erase, expected_drift

    subspace = SafetySubspace.from_models(pair["aligned"], pair["base"], LoxConfig(r=R))
    model = AutoModelForCausalLM.from_pretrained(pair["aligned"], dtype=getattr(torch, dtype))
    monitor = DriftMonitor(model, subspace)
    aligned, base = (zoo.read_checkpoint(pair[side]) for side in ("aligned", "base"))
    exact = {name: tensor.double() for name, tensor in aligned.items()}
    rows = []
    for share in SHARES:
        model.load_state_dict(erase(exact, base, R, share))  # rounded once, to the dtype of training
        reading = monitor.read()
        names = [drift.name for drift in reading.tensors]
        row = {"left": 1 - share, "retention": reading.retention, "matrices": len(names)}
        row["of_these_weights"] = expected_drift(model.state_dict(), aligned, base, R, names).retention
        rows.append(row | {"worst_matrix": max(abs(drift.retention - 1 + share) for drift in reading.tensors)})
    return {"readings": rows}


def r_metrics(pair: dict[str, Any], folder: str, reference: str | None) -> dict[str, Any]:
    """Read fine-tuned models beside the definition in float64 and the reference's own script, where it is there."""
    sys.path[:0] = [str(TESTS), str(TESTS / "parity")]
    from record_r_metrics import KINDS, RANKS, SEED, run, save_as, tuned_model

    import zoo
    from drift_oracle import expected_drift

    work = Path(folder)
    pairs = {kind: zoo.save_pair(kind, work / kind, seed=SEED) for kind in KINDS}
    pairs["llama-exact"] = zoo.Pair("llama", Path(pair["aligned"]), Path(pair["base"]), torch.bfloat16, seed=0)
    rows = []
    for name, models in pairs.items():
        tuned = save_as(tuned_model(models), models.aligned_dir, work / f"{name}-tuned")
        for r in RANKS:
            subspace = SafetySubspace.from_models(models.aligned_dir, models.base_dir, LoxConfig(r=r))
            reading = read_drift(tuned, subspace, models.base_dir)
            names = [drift.name for drift in reading.tensors]
            exact = expected_drift(zoo.read_checkpoint(tuned), models.aligned(), models.base(), r, names)
            row = {"model": name, "r": r, "ours": {"r_ft": reading.r_ft, "r_align": reading.r_align}}
            row["definition"] = {"r_ft": exact.r_ft, "r_align": exact.r_align}
            if reference is not None:
                row["reference"] = run(Path(reference), tuned, models.aligned_dir, models.base_dir, r)
            rows.append(row)
    return {"rows": rows}


def directions(pair: dict[str, Any], folder: str) -> dict[str, Any]:
    """Save the directions of a pair of checkpoints."""
    SafetySubspace.from_models(pair["aligned"], pair["base"], LoxConfig(r=R)).save_pretrained(folder)
    return {}


def spread(pair: dict[str, Any], subspace: str, folder: str, backend: str) -> dict[str, Any]:
    """Be one of two processes: train with readings, read against the base too, and save the weights that were read."""
    from transformers.distributed import DistributedConfig

    options: dict[str, Any] = {"dtype": torch.float32}
    if backend == "FSDP2":
        torch.distributed.init_process_group("gloo")
        options["distributed_config"] = DistributedConfig(fsdp_size=2)
    deepspeed = None if backend == "FSDP2" else ZERO_3
    # Before the model, which ZeRO 3 takes apart as it is loaded.
    run = _arguments(f"{folder}/run", SPREAD_STEPS, learning_rate=1e-3, ddp_backend="gloo", deepspeed=deepspeed)
    model = AutoModelForCausalLM.from_pretrained(pair["aligned"], **options)
    trainer = _trainer(model, run, [LoxCallback(subspace, every_n_steps=SPREAD_STEPS)])
    trainer.train()
    model = trainer.model
    matrices = open_weights(model).matrices.values()
    loaded = SafetySubspace.from_pretrained(subspace)
    reading = read_drift(model, loaded, pair["base"])
    Path(folder, f"{torch.distributed.get_rank()}.json").write_text(reading.to_json())
    trainer.save_model(f"{folder}/saved")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    return {"kinds": sorted({type(matrix).__name__ for matrix in matrices})}


def alone(pair: dict[str, Any], subspace: str, folder: str) -> dict[str, Any]:
    """Read the same weights in one process that holds all of them, and compare every figure of every matrix."""
    loaded = SafetySubspace.from_pretrained(subspace)
    lines = Path(folder, "run", "lox", "readings.jsonl").read_text().splitlines()
    begin, *_, end = (TrainingReading.from_json(line).drift for line in lines)
    final = [DriftReading.from_json(Path(folder, f"{rank}.json").read_text()) for rank in range(2)]
    first, last = (read_drift(weights, loaded, pair["base"]) for weights in (pair["aligned"], f"{folder}/saved"))
    return {
        "matrices": len(last.tensors),
        "begin": first.retention,
        "end": last.retention,
        "retention": max(_difference(begin, first, "retention"), _difference(end, last, "retention")),
        "r_metrics": max(_difference(one, last, name) for one in final for name in ("r_ft", "r_align")),
    }


def _difference(one: DriftReading, other: DriftReading, figure: str) -> float:
    """The largest difference in one figure, over the whole model and every matrix."""
    records = zip(
        [one, *sorted(one.tensors, key=lambda drift: drift.name)],
        [other, *sorted(other.tensors, key=lambda drift: drift.name)],
        strict=True,
    )
    return max(abs(getattr(a, figure) - getattr(b, figure)) for a, b in records)


class _Clock(TrainerCallback):
    """Notes the CPU time at which hooks are reached: one before another callback and one after it time its hooks."""

    def __init__(self) -> None:
        self.at: dict[str, list[float]] = {"begin": [], "step": [], "epoch": [], "end": []}

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.at["begin"].append(time.process_time())

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.at["step"].append(time.process_time())

    def on_epoch_end(self, *_: Any, **__: Any) -> None:
        self.at["epoch"].append(time.process_time())

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.at["end"].append(time.process_time())


class _Scale(TrainerCallback):
    """Weighs the process at the end of a step: what is resident, and the storages of all tensors."""

    def __init__(self) -> None:
        self.found: dict[str, int] = {}
        self.at_s = 0.0

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.at_s = time.monotonic()  # what follows is the weighing itself
        gc.collect()
        self.found = {"anonymous_bytes": anonymous_bytes(), "storage_bytes": _storage_bytes()}


def _timed_training(
    quick: bool, steps: int, callback: LoxCallback | None, batch: tuple[int, int]
) -> tuple[dict[str, Any], str]:
    """Train a fresh model; return its CPU-seconds by part, and what identifies the weights it ends with."""
    before, after = _Clock(), _Clock()
    with tempfile.TemporaryDirectory() as folder:
        watched: list[TrainerCallback] = [before, *filter(None, [callback]), after]
        trainer = _trainer(_model(quick), _arguments(folder, steps, batch=batch[0]), watched, batch[1])
        if callback is not None:
            callback.attach(trainer)
        started = time.process_time()
        trainer.train()
        total = time.process_time() - started
    hooks = {
        name: [end - start for start, end in zip(before.at[name], after.at[name], strict=True)] for name in after.at
    }
    durations = [end - start for start, end in zip(after.at["step"], before.at["step"][1:], strict=False)]
    digest = hashlib.sha256()
    for weight in trainer.model.parameters():
        digest.update(weight.detach().numpy().data)
    return {"total_s": total, "steps_s": durations, "hooks_s": hooks}, digest.hexdigest()


def _factor_bytes(subspace: Any) -> int:
    """Bytes of U, S, Vh and the base's coordinates of every matrix."""
    parts = [part for factors in subspace.factors.values() for part in (factors.U, factors.S, factors.Vh)]
    return sum(part.nbytes for part in [*parts, *subspace.base_coordinates.values()])


def _storage_bytes() -> int:
    """Bytes of the storages of all tensors of the process, gradients included, each once."""
    tensors = [item for item in gc.get_objects() if issubclass(type(item), torch.Tensor)]
    tensors += [tensor.grad for tensor in tensors if tensor.is_leaf and tensor.grad is not None]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def _model(quick: bool) -> LlamaForCausalLM:
    """A Llama of random weights in float32, the same each time."""
    size: dict[str, Any] = QUICK if quick else LARGE
    heads = size["hidden_size"] // HEAD_SIZE
    config = LlamaConfig(**size, num_attention_heads=heads, num_key_value_heads=heads, tie_word_embeddings=False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config)


def _base_of(model: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    """The model's weights, each matrix less a change of rank R."""
    generator, base = torch.Generator().manual_seed(1), dict(model.state_dict())
    for name, weight in base.items():
        if weight.ndim == 2:
            left, right = (torch.linalg.qr(torch.randn(side, R, generator=generator)).Q for side in weight.shape)
            base[name] = weight - (left * torch.linspace(1.0, 0.5, R)) @ right.T
    return base


def _arguments(folder: str, steps: int, *, batch: int = 1, **changes: Any) -> TrainingArguments:
    settings: dict[str, Any] = {"learning_rate": 1e-5, **changes}
    return TrainingArguments(
        folder,
        max_steps=steps,
        per_device_train_batch_size=batch,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        seed=0,
        **settings,
    )


def _trainer(model: Any, arguments: TrainingArguments, callbacks: list[TrainerCallback], length: int = 32) -> Any:
    """A trainer over random rows of tokens, as many as two processes need."""
    rng = random.Random(0)
    rows: Any = []
    for _ in range(2 * arguments.per_device_train_batch_size * arguments.max_steps):
        ids = [rng.randrange(model.config.vocab_size) for _ in range(length)]
        rows.append({"input_ids": ids, "labels": ids})
    return Trainer(model, arguments, train_dataset=rows, callbacks=callbacks)


if __name__ == "__main__":
    jobs = (prepare, coarse_pair, compare, memory, erased, r_metrics, directions, spread, alone)
    serve_job({job.__name__: job for job in jobs})
