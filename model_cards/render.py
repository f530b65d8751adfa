"""Render the cards in this folder anew: harden the demo's pair in three forms, measure, write what push would write.

python model_cards/render.py lox-demo/seed-0 --stress lox-demo/stress
"""

import argparse
import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lox_hf import LoxConfig, SafetySubspace, compare, evaluate_safety, extract_lox_adapter, harden_checkpoint
from lox_hf.evaluation.models.loading import load_model
from lox_hf.hub.artefact import open_artefact
from lox_hf.hub.card import make_card
from lox_hf.hub.evidence import Evidence, load_evidence
from lox_hf.hub.push import draw_picture
from lox_hf.records import SafetyReport

HERE = Path(__file__).resolve().parent
PAIR = Path("lox-demo/seed-0")
"""What the pair is called on the cards, wherever it lies: the folder that `lox-hf demo` makes."""
R, ALPHA, LONGEST_ANSWER = 2, 0.5, 16
FORMS = ("dense", "adapter", "subspace")


def main() -> None:
    """Harden, measure and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("pair", type=Path, help="a pair of lox-hf demo: aligned, base and questions.jsonl")
    parser.add_argument("--stress", type=Path, help="a stress test of the pair: its folder or results.json")
    parser.add_argument("--output", type=Path, default=HERE, help="folder of the cards (default: this one)")
    options = parser.parse_args()
    stress = [] if options.stress is None else [options.stress.resolve()]
    output = options.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    with _named(options.pair.resolve()):
        for form, evidence in _made(stress):
            artefact = open_artefact(form)
            picture = draw_picture(artefact.report)
            card = make_card(
                artefact, evidence, repo_id=f"org/lox-demo-{form}", license="mit", picture=picture is not None
            )
            text = str(card)
            if picture is not None:
                name = f"{form}-energy.png"
                (output / name).write_bytes(picture)
                text = text.replace("(energy.png)", f"({name})")  # three cards share this folder
            (output / f"{form}.md").write_text(text, encoding="utf-8")


@contextmanager
def _named(pair: Path) -> Iterator[None]:
    """Work in a folder in which the pair has its usual name, so that no path of this machine is on a card."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / PAIR.parent).mkdir()
        (Path(folder) / PAIR).symlink_to(pair)
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(before)


def _made(stress: list[Path]) -> Iterator[tuple[str, Evidence]]:
    """Yield each form with what was measured of it; a subspace answers nothing."""
    aligned, config = str(PAIR / "aligned"), LoxConfig(str(PAIR / "base"), r=R, alpha=ALPHA)
    harden_checkpoint(aligned, "dense", config)
    extract_lox_adapter(aligned, "adapter", config)
    SafetySubspace.from_models(aligned, config=config).save_pretrained("subspace")
    before = _measure(aligned, "before")
    for form in FORMS[:2]:
        after = _measure(form, f"after-{form}")
        (Path(f"after-{form}") / "comparison.json").write_text(compare(before, after).to_json(), encoding="utf-8")
        # A stress test attacks all weights, so it is of the first form.
        attacked = stress if form == FORMS[0] else []
        yield form, load_evidence(["before", f"after-{form}", *attacked], aligned=aligned, hardened=[form])
    yield "subspace", Evidence()


def _measure(name: str, output: str) -> SafetyReport:
    model, tokenizer = load_model(name, device="cpu")
    questions = PAIR / "questions.jsonl"
    return evaluate_safety(model, tokenizer, questions, output_dir=output, max_new_tokens=LONGEST_ANSWER)


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        main()
