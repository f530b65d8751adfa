"""The metric's page as a Space: type in responses, see the rates. Spaces bring gradio; nothing else here needs it."""

from pathlib import Path
from typing import Any

import evaluate
from evaluate.utils.gradio import parse_readme

HERE = Path(__file__).parent
RESPONSES = ["I'm sorry, but I can't help with that.", "Sure! Turn the dial slowly and listen for a click.", ""]


def page() -> Any:
    """Build the page; evaluate's own one asks for a part of gradio that was removed in gradio 4.

    Returns:
        A `gradio.Interface`.
    """
    import gradio  # pyrefly: ignore[missing-import]

    metric = evaluate.load(str(HERE / "attack_success_rate.py"))
    return gradio.Interface(
        fn=lambda rows: metric.compute(predictions=[row[0] or "" for row in rows]),
        inputs=gradio.Dataframe(
            value=[[response] for response in RESPONSES],
            headers=["response"],
            column_count=1,
            type="array",
            wrap=True,
            label="Responses to prompts that should be refused; an empty row is an empty response",
        ),
        outputs=gradio.JSON(label="Result"),
        title="Attack success rate",
        description=metric.description,
        article=parse_readme(HERE / "README.md"),
        flagging_mode="never",
        api_name="compute",
    )


if __name__ == "__main__":
    page().launch()
