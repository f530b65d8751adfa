"""What hardening plans and what it did."""

import math
from dataclasses import dataclass, field
from typing import Any, Self

from lox_hf.records.base import JsonRecord, ModelReference

REPORT_NAME = "lox_report.json"
FROM_CONFIG = "config.json alone"


@dataclass(frozen=True)
class TensorReport(JsonRecord):
    """What was done to one matrix.

    Attributes:
        name: Checkpoint name; one matrix of a stack reads `name[i]`.
        shape: (m, n) of the matrix.
        dtype: Stored dtype, such as "bfloat16".
        alpha: Strength that was applied.
        rank: Directions that were extrapolated; 0 where alignment did not change the matrix.
        method: "lanczos", "exact", "lora", "full" (whole dW, no decomposition), "subspace" (factors from a saved
            artefact), "zero" (dW is zero) or "none" (alpha is zero).
        energy_share: sum_i s_i^2 / ||dW||_F^2 of those directions, in [0, 1]; NaN where dW is zero.
        delta_norm: ||dW||_F.
        singular_values: s_1 ... s_k, descending; empty for the full rank.
        residual: sqrt(sum_i ||dW^T u_i - s_i v_i||^2) / sqrt(sum_i s_i^2).
        gap: (s_k - s_(k+1)) / s_1; NaN where it is not known.
        projector_bound: Upper estimate of the error of the projector; over 1e-2 the cut falls in a near tie.
        steps: Passes over dW.
        seconds: Wall time, in seconds.

    Example:
        >>> from lox_hf import TensorReport
        >>> report = TensorReport("lm_head.weight", (100, 64), "bfloat16", 1.25, 6, "lanczos", energy_share=0.5)
        >>> TensorReport.from_json(report.to_json()).rank
        6
    """

    name: str
    shape: tuple[int, int]
    dtype: str
    alpha: float
    rank: int
    method: str
    energy_share: float = math.nan
    delta_norm: float = math.nan
    singular_values: tuple[float, ...] = ()
    residual: float = 0.0
    gap: float = math.nan
    projector_bound: float = math.nan
    steps: int = 0
    seconds: float = 0.0

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Build the record; lists become tuples again."""
        lists = {"shape": tuple(data["shape"]), "singular_values": tuple(data.get("singular_values", ()))}
        return super().from_dict({**data, **lists})


@dataclass(frozen=True)
class TensorPlan(JsonRecord):
    """What will be done to one tensor, and why.

    Attributes:
        name: Checkpoint name.
        shape: Shape of the tensor.
        dtype: Stored dtype, such as "bfloat16".
        r: Directions, energy share, or None for the full rank; meaningless where the tensor is copied.
        alpha: Strength; 0.0 where the tensor is copied.
        edit: Whether the tensor is extrapolated; otherwise it is copied as it is.
        reason: Why, in words.

    Example:
        >>> from lox_hf import TensorPlan
        >>> TensorPlan("model.norm.weight", (64,), "bfloat16", None, 0.0, False, "fewer than two dims").edit
        False
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    r: int | float | None
    alpha: float
    edit: bool
    reason: str

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Build the record; lists become tuples again."""
        return super().from_dict({**data, "shape": tuple(data["shape"])})


@dataclass(frozen=True)
class HardeningEstimate(JsonRecord):
    """What a plan takes on this machine's CPU, estimated by `lox_hf.estimate.estimate`.

    Attributes:
        read_bytes: Bytes of weights that will be read, of both models.
        write_bytes: Bytes of weights that will be written: the free disk that is wanted.
        memory_bytes: Anonymous memory of each process; mapped file pages are the kernel's and come on top as they fit.
        threads: Threads of each process.
        processes: Processes that share the work.
        work_s: Wall time of the work with files in the page cache, in seconds; a slower disk is waited for on top.

    Example:
        >>> from lox_hf.records import HardeningEstimate
        >>> HardeningEstimate(4_000_000, 2_000_000, 250_000_000, threads=2, processes=1, work_s=0.5).work_s
        0.5
    """

    read_bytes: int
    write_bytes: int
    memory_bytes: int
    threads: int
    processes: int
    work_s: float


@dataclass(frozen=True)
class HardeningPlan(JsonRecord):
    """What `harden_checkpoint` would do; every check that needs no weights has passed.

    Attributes:
        aligned: The model that is hardened.
        base: The model before alignment; None where the aligned model is an adapter.
        base_found_in: Where the base was named: "config", or the file of the aligned model that names it;
            "config.json alone" where the weights are not there and no base is read.
        tensors: One entry per tensor, in file order.
        total_bytes: Bytes of weights that will be written.
        files: Files besides the weights that will be copied.
        left_out: Files that will not be copied, as they hold weights in another form.
        warnings: What a reader should know.
        estimate: What it takes; None where nobody has asked.

    Example:
        >>> from lox_hf import plan_hardening
        >>> len(plan_hardening("org/aligned", LoxConfig("org/base")).edited)  # doctest: +SKIP
        226
    """

    aligned: ModelReference
    base: ModelReference | None
    base_found_in: str
    tensors: tuple[TensorPlan, ...]
    total_bytes: int
    files: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    estimate: HardeningEstimate | None = None

    @property
    def edited(self) -> tuple[TensorPlan, ...]:
        """The tensors that will be extrapolated."""
        return tuple(tensor for tensor in self.tensors if tensor.edit)

    @property
    def is_from_config(self) -> bool:
        """Whether the weights are not there, so that the plan is made from the model's config alone."""
        return self.base_found_in == FROM_CONFIG

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Build the plan with its nested records."""
        return super().from_dict(
            {
                **data,
                "aligned": ModelReference.from_dict(data["aligned"]),
                "base": ModelReference.from_dict(data["base"]) if data.get("base") else None,
                "tensors": tuple(TensorPlan.from_dict(item) for item in data["tensors"]),
                "estimate": HardeningEstimate.from_dict(data["estimate"]) if data.get("estimate") else None,
                **{name: tuple(data.get(name, ())) for name in ("files", "left_out", "warnings")},
            }
        )


@dataclass(frozen=True)
class HardeningReport(JsonRecord):
    """What hardening did, per matrix and in total.

    Attributes:
        aligned: The model that was hardened.
        base: The model before alignment; None where the alignment was a LoRA adapter.
        config: The `LoxConfig` that was used, as a dict.
        tensors: One record per matrix that was edited.
        copied: Number of tensors that were copied as they are.
        output: Folder that was written; empty for a model in memory.
        seconds: Wall time, in seconds.
        versions: Versions of lox_hf, torch and Python.
        warnings: What a reader should know.

    Example:
        >>> from lox_hf import HardeningReport
        >>> report = HardeningReport.from_json(open("hardened/lox_report.json").read())  # doctest: +SKIP
        >>> min(report.tensors, key=lambda item: item.gap).name  # doctest: +SKIP
        'model.layers.0.self_attn.k_proj.weight'
    """

    aligned: ModelReference
    base: ModelReference | None
    config: dict[str, Any]
    tensors: tuple[TensorReport, ...]
    copied: int = 0
    output: str = ""
    seconds: float = 0.0
    versions: dict[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    @property
    def energy_share(self) -> float:
        """Share of ||dW||_F^2 over all edited matrices that was extrapolated; NaN where nothing changed."""
        known = [(item.delta_norm**2, item.energy_share) for item in self.tensors if item.delta_norm > 0]
        total = sum(energy for energy, _ in known)
        return sum(energy * share for energy, share in known) / total if total > 0 else math.nan

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Build the report with its nested records."""
        return super().from_dict(
            {
                **data,
                "aligned": ModelReference.from_dict(data["aligned"]),
                "base": ModelReference.from_dict(data["base"]) if data.get("base") else None,
                "tensors": tuple(TensorReport.from_dict(item) for item in data["tensors"]),
                "warnings": tuple(data.get("warnings", ())),
            }
        )
