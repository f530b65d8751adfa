"""`select`: a grid of hardenings, each measured; what it costs, what it brings, and which one to take."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from lox_hf.analysis.candidates import ALL, Targets
from lox_hf.analysis.formed import FormedModel, of_live_weights
from lox_hf.analysis.grid import Grid
from lox_hf.analysis.limits import DEFAULT_LIMITS, check_limits
from lox_hf.analysis.points import ScoreFn
from lox_hf.analysis.recommend import STRENGTH, judge, recommend, worth_attacking
from lox_hf.config import CONFIG_NAME, LoxConfig
from lox_hf.errors import ConfigError
from lox_hf.inputs import ModelLike, open_pair
from lox_hf.jobs import Runner
from lox_hf.records import Candidate, Limit, Score, Selection
from lox_hf.run_folder import RunFolder
from lox_hf.subspace import SafetySubspace
from lox_hf.version import versions

RS: tuple[int | float | None, ...] = (2, 6, None)
ALPHAS = (0.25, 0.5, 0.75, 1.0, 1.25)
ATTACK_MOST = 8
RECORD_NAME = "selection.json"
RUN = {"run": "selection"}
"""What the run's folder is for; what every point depends on stands with the point."""
OBJECTIVES = ("asr_mean", "asr")
"""What decides after an attack, the first that was measured."""


def select(
    model: nn.Module,
    base_model: ModelLike | None,
    score_fn: ScoreFn,
    *,
    rs: Sequence[int | float | None] = RS,
    alphas: Sequence[float] = ALPHAS,
    targets: Sequence[Targets] = (ALL,),
    limits: Sequence[Limit] = DEFAULT_LIMITS,
    attack_fn: ScoreFn | None = None,
    attack_most: int = ATTACK_MOST,
    objective: str | None = None,
    config: LoxConfig | None = None,
    aligned_model: ModelLike | None = None,
    subspace: SafetySubspace | None = None,
    about: dict[str, Any] | None = None,
    attack_about: dict[str, Any] | None = None,
    output_dir: str | Path | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    trust_remote_code: bool = False,
    progressbar: bool | None = None,
) -> Selection:
    """Measure a grid of hardenings W + alpha * Proj_r(dW) (paper, section 3), and recommend one or none.

    Every candidate is formed in the loaded model from one decomposition, so that no second model is in memory; its
    weights are back bit for bit at the end, however it ends. By default a recommendation may cost, against the aligned
    model, at most 2 points of attack success rate, 5 of over-refusal, 2 of degenerate answers, 2 of accuracy (known
    answers, GSM8K), 0.1 nats of KL divergence, and 5 % of the perplexity; a limit on what was not measured is not
    judged. Among those that keep the limits an attack decides, and without one the size of the edit, which says
    nothing about robustness. See `recommend` for the rules.

    Args:
        model: The loaded aligned model.
        base_model: The model before alignment: folder, Hub id, loaded model or state dict; None takes what `config`
            or the aligned model's own files name.
        score_fn: Measures the model: returns a record, rates or numbers, and leaves the weights as they are.
        rs: Ranks: an int is a number of directions, a float a share of the energy, None the full rank (ExPO).
        alphas: Strengths, above 0.
        targets: Which weights, by words: "all", "attention", "mlp", "no-embeddings", "all-linear", names of modules or
            a regular expression; see `candidates.make_trials`.
        limits: What a recommendation may cost.
        attack_fn: Attacks the model, such as by a short fine-tuning, and measures it; the weights may be of no use
            afterwards, but must be changed in place. None attacks nothing.
        attack_most: How many candidates are attacked, besides the aligned model, the paper's setting and full rank;
            see `recommend.worth_attacking` for which.
        objective: Which measure of `attack_fn` decides, lower being better; None takes the mean attack success rate
            along the attack, else the one at its end, else the only measure there is.
        config: What all candidates share, such as `exclude_modules`; its rank, alpha and targets are not used. None
            takes the settings of `subspace`, else the defaults.
        aligned_model: Folder or Hub id of `model`, from which its weights are read again; None keeps a copy of them.
        subspace: Directions that were found before, deep enough for all of `rs`; None finds them.
        about: Settings of `score_fn`, as JSON values: a point that was measured with others is not read again. The
            dtype of the loaded model is one of them in any case.
        attack_about: The same of `attack_fn`.
        output_dir: Folder of the run: `selection.json`, the recommended `lox_config.json`, every point, and the
            directions. A killed run goes on there, and a finished one takes further ranks, alphas and targets. None
            keeps everything in memory.
        revision: Revision of `aligned_model` on the Hub.
        token: Hub token; None uses the stored login.
        trust_remote_code: Run modelling code of the aligned model's repository.
        progressbar: Show progress bars; None shows them on a terminal only.

    Returns:
        The candidates side by side, and the recommendation with its reasons.

    Raises:
        ConfigError: If a setting is out of range, targets match nothing, no base is named, or a function returns
            nothing that can be read.
        PairingError: If the models or the subspace do not fit together.
        CheckpointError: If files are missing or damaged.
        UnsupportedModelError: If weights are quantised, offloaded or sharded, or an attack puts others in their place.
        AlreadyHardenedError: If the aligned model is hardened already.
        NumericsError: If a matrix contains NaN or Inf, or overflows; it is named.
        OutputError: If the folder holds something else or points of another run, or cannot be written.

    Example:
        >>> import torch
        >>> aligned, base = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
        >>> def norm(model):
        ...     return {"norm": model.weight.norm().item()}
        >>> found = select(aligned, base, norm, rs=[1, None], alphas=[0.5], limits=[Limit("norm", 100)])
        >>> found.recommended, found.objective
        ('r=full alpha=0.5 all', 'strength')

    Source: Perin et al., COLM 2025, section 4 and its ablation of k and alpha.
    """
    check_limits(limits)
    if attack_most < 1:
        raise ConfigError(f"attack_most must be 1 or more, got {attack_most}; leave attack_fn out to attack nothing.")
    folder = RunFolder(output_dir, RUN)
    folder.check()
    formed = FormedModel(model, aligned_model, revision=revision, token=token)
    shared = config or (LoxConfig() if subspace is None else subspace.config)
    pair = open_pair(
        model if aligned_model is None else aligned_model,
        base_model,
        replace(shared, r=1, alpha=1.0, target_modules=None, rank_pattern=None, alpha_pattern=None),
        revision=revision,
        token=token,
        trust_remote_code=trust_remote_code,
    )
    grid = Grid(formed, of_live_weights(pair, formed), about or {}, rs, alphas, targets)
    if subspace is not None:
        grid.check(subspace)
    with folder, formed.restored_afterwards():
        runner: Runner[Score] = Runner(folder, progressbar=progressbar)
        jobs = grid.jobs("points", {}, score_fn)
        under_attack = {"attack": attack_about or {}}
        for job in [*jobs, *(() if attack_fn is None else grid.jobs("attacked", under_attack, attack_fn))]:
            runner.kept(job)  # results with other settings are refused before any work
        grid.find_directions(subspace, folder, progressbar)
        aligned_score, *scores = runner.results(jobs, "Measuring candidates", "model")
        selection = Selection(
            aligned=pair.aligned.reference,
            base=pair.factors.reference,
            aligned_score=aligned_score,
            candidates=tuple(map(grid.candidate, grid.trials, scores)),
            limits=tuple(limits),
            objective=STRENGTH,
            versions=versions("transformers"),
        )
        if attack_fn is not None:
            chosen = worth_attacking(judge(selection.candidates, aligned_score, limits), attack_most)
            attacks = grid.jobs("attacked", under_attack, grid.in_place(attack_fn), chosen)
            found = runner.results(attacks, "Attacking candidates", "model")
            selection = _with_attacks(selection, chosen, found, objective)
        selection = recommend(selection)
        _write(folder, selection)
    return selection


def _with_attacks(
    selection: Selection, chosen: Sequence[Candidate], found: Sequence[Score], objective: str | None
) -> Selection:
    aligned, *scores = found
    by_name = dict(zip((item.name for item in chosen), scores, strict=True))
    candidates = tuple(replace(item, attacked=by_name.get(item.name)) for item in selection.candidates)
    name = _objective(aligned, objective)
    return replace(selection, candidates=candidates, aligned_attacked=aligned, objective=name)


def _objective(attacked: Score, asked: str | None) -> str:
    """The measure that decides after an attack."""
    known = [name for name in attacked.names() if not math.isnan(attacked.value(name))]
    usual = [name for name in OBJECTIVES if name in known][:1]
    candidates = (usual or known) if asked is None else [asked]
    if len(candidates) != 1 or candidates[0] not in known:
        raise ConfigError(
            f"objective is {asked!r}, and the attack measured of the aligned model: {', '.join(known) or 'nothing'}. "
            "Say which of these decides."
        )
    return candidates[0]


def _write(folder: RunFolder, selection: Selection) -> None:
    """Write the record, and the recommended settings where there are any; those of an earlier call go."""
    if selection.recommended is not None:
        folder.write(CONFIG_NAME, LoxConfig.from_dict(selection.get(selection.recommended).config).to_json())
    elif folder.folder is not None:
        (folder.folder / CONFIG_NAME).unlink(missing_ok=True)
    folder.write(RECORD_NAME, selection.to_json())
