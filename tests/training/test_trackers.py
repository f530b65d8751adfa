"""Rows in TensorBoard's event files and in trackio's storage, beside the trainer's own."""

import sys
import warnings
from pathlib import Path

import pytest

from lox_hf import LoxCallback, SafetySubspace
from training.callback_runs import KINDS, make_subspace, make_trainer, retentions, run


@pytest.fixture(scope="module")
def subspace() -> SafetySubspace:
    return make_subspace()


def tensorboard(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Steps and values by tag."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: dict[str, list[tuple[int, float]]] = {}
    for path in sorted(folder.rglob("events.out.tfevents*")):
        events = EventAccumulator(str(path)).Reload()
        for tag in events.Tags()["scalars"]:
            found.setdefault(tag, []).extend((event.step, event.value) for event in events.Scalars(tag))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_tensorboard(kind: str, subspace: SafetySubspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    callback = LoxCallback(subspace, every_n_steps=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="LoxCallback")
        run(tmp_path / "out", callback, kind, report_to="tensorboard")
    found = tensorboard(tmp_path / "board")
    assert [step for step, _ in found["train/lox/retention"]] == list(range(7))
    assert [value for _, value in found["train/lox/retention"]] == pytest.approx(retentions(callback), abs=1e-6)
    assert [step for step, _ in found["train/loss"]] == list(range(1, 7))
    if kind == "sft":
        assert [step for step, _ in found["train/mean_token_accuracy"]] == list(range(1, 7))


def test_trackio(subspace: SafetySubspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    # It has read the variable of this name when it was imported.
    for module in [module for name, module in sys.modules.items() if name.split(".")[0] == "trackio"]:
        if hasattr(module, "TRACKIO_DIR"):
            monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    callback = LoxCallback(subspace, every_n_steps=1)
    run(tmp_path / "out", callback, report_to="trackio", project="watched", run_name="one")
    logs = SQLiteStorage.get_logs("watched", "one")
    own = [row["train/lox/retention"] for row in logs if "train/lox/retention" in row]
    assert own == pytest.approx(retentions(callback), abs=1e-9)
    assert sum("train/loss" in row for row in logs) == 6


def test_without_attach_trackers_get_none_and_this_is_said_once(
    subspace: SafetySubspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    callback = LoxCallback(subspace, every_n_steps=1)
    trainer = make_trainer(tmp_path / "out", report_to="tensorboard", callbacks=[callback])
    with pytest.warns(UserWarning, match=r"do not reach tensorboard: call callback\.attach\(trainer\)") as caught:
        trainer.train()
    assert sum("attach" in str(item.message) for item in caught) == 1
    found = tensorboard(tmp_path / "board")
    assert "train/lox/retention" not in found
    assert "train/loss" in found
