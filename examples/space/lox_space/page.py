"""The page: fields, buttons, and which function each of them calls."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from lox_hf.errors import LoxError
from lox_space import views
from lox_space.form import read_order
from lox_space.jobs import Hardened, Planned, Workshop
from lox_space.settings import Settings

CSS = Path(__file__).with_name("page.css")
TITLE = "Harden a model with LoX"
LEAD = f"""
# {TITLE}

Takes the change that safety alignment made to a model's weights and adds its strongest directions once more, so that
later fine-tuning undoes it less easily. **It does not make a model safe, and it measures nothing:** measure your model
before and after.
"""
FOOT = """
Public models in safetensors only, up to {size:.3g} GB each{folders}. No code of a model's repository runs. Models are
removed when they are pushed, or after {minutes:.0f} minutes. The method:
[LoX, COLM 2025](https://arxiv.org/abs/2506.15606).
"""
TOKEN_ATTRIBUTES = gr.InputHTMLAttributes(autocomplete="off", spellcheck=False)
HIDDEN, SHOWN = gr.update(visible=False), gr.update(visible=True)


def make_page(workshop: Workshop) -> gr.Blocks:
    """Build the page.

    Args:
        workshop: Who does the work.

    Returns:
        The page; `launch_options` has how it is launched.
    """
    settings = workshop.settings
    with gr.Blocks(title=TITLE, analytics_enabled=False) as page:
        gr.Markdown(LEAD, elem_id="lead")
        planned = gr.State(time_to_live=settings.keep_seconds)
        hardened = gr.State(time_to_live=settings.keep_seconds, delete_callback=workshop.drop)
        fields = _fields(settings)
        plan_button = gr.Button("Show the plan", variant="primary", elem_id="plan-button")
        plan_view = gr.HTML(visible=False, elem_id="plan")
        run_button = gr.Button("Harden", variant="primary", visible=False, elem_id="run-button")
        report_view = gr.HTML(visible=False, elem_id="report")
        with gr.Accordion("The model card", open=False, visible=False, elem_id="card") as card_view:
            card = gr.Markdown(sanitize_html=True)
        with gr.Column(visible=False, elem_id="push") as push_form:
            gr.Markdown("### Push it to the Hub")
            repo_id = gr.Textbox(label="Repository", placeholder="your-name/model-lox", max_length=200)
            token = gr.Textbox(
                label="Your token",
                info="With write access. It is used for this upload, then forgotten: never stored, never shown.",
                type="password",
                max_length=500,
                html_attributes=TOKEN_ATTRIBUTES,
                elem_id="token",
            )
            public = gr.Checkbox(label="Public", info="Whether a new repository can be read by everybody.")
            push_button = gr.Button("Push", variant="primary", elem_id="push-button")
        push_view = gr.HTML(visible=False, elem_id="pushed")
        gr.Markdown(_foot(settings), elem_id="foot")

        later = [run_button, report_view, card_view, push_form, push_view]
        # No endpoint of the page is for programs: they have the library.
        quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        work: dict[str, Any] = {**quiet, "concurrency_limit": 1, "concurrency_id": "work", "trigger_mode": "once"}
        plan_button.click(
            partial(_plan, workshop), [*fields, hardened], [planned, hardened, plan_view, *later], **quiet,
            concurrency_limit=2, trigger_mode="once",
        )  # fmt: skip
        run_button.click(
            partial(_harden, workshop),
            [planned, hardened],
            [hardened, report_view, run_button, card, card_view, push_form],
            **work,
        )
        push_button.click(
            partial(_push, workshop),
            [hardened, repo_id, token, public],
            [token, hardened, push_view, push_form],
            **work,
        )
        for field in fields:  # a plan that is not that of the fields is not shown
            field.input(lambda: [None, *[HIDDEN] * 2], None, [planned, plan_view, run_button], **quiet, queue=False)
    return page.queue(max_size=20, api_open=False)


def launch_options() -> dict[str, Any]:
    """How the page is launched: nothing of a run is recorded, and nothing is asked of other hosts.

    Returns:
        Keyword arguments of `launch`.
    """
    fonts = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
    theme = gr.themes.Base(
        primary_hue="teal",
        neutral_hue="slate",
        font=fonts,
        font_mono=["ui-monospace", "Menlo", "Consolas", "monospace"],
        radius_size="md",
    ).set(
        # Dark enough to be read in sunlight: white on teal and small grey text need a ratio of 4.5 to 1.
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        block_info_text_color="*neutral_600",
        body_text_color_subdued="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        body_text_color_subdued_dark="*neutral_300",
    )
    return {
        "theme": theme,
        "css_paths": CSS,
        "footer_links": [],
        "run_history": False,
        "show_error": False,
        "enable_monitoring": False,
        "ssr_mode": False,
        "quiet": True,
    }


def _fields(settings: Settings) -> list[Any]:
    kind = "Hub id" + (" or folder" if settings.allow_folders else "")
    with gr.Group():
        aligned = gr.Textbox(
            label="Aligned model", info=f"{kind} of the model to harden", placeholder="org/aligned", elem_id="aligned"
        )
        base = gr.Textbox(
            label="Base model", info=f"{kind} of what it was before alignment", placeholder="org/base", elem_id="base"
        )
    with gr.Row():
        r = gr.Number(6, label="Directions", info="in each matrix", precision=0, minimum=1, elem_id="r")
        alpha = gr.Number(1.25, label="Strength", info="too much breaks it", step=0.25, elem_id="alpha")
    with gr.Accordion("Revisions", open=False, elem_id="revisions"), gr.Row():
        newest = {"placeholder": "newest", "info": "branch, tag or commit"}
        aligned_revision = gr.Textbox(label="Of the aligned model", **newest, elem_id="aligned-revision")
        base_revision = gr.Textbox(label="Of the base model", **newest, elem_id="base-revision")
    return [aligned, aligned_revision, base, base_revision, r, alpha]


def _foot(settings: Settings) -> str:
    folders = ", and folders of this machine" if settings.allow_folders else ""
    return FOOT.format(size=settings.max_bytes / 1e9, folders=folders, minutes=settings.keep_seconds / 60)


def _plan(workshop: Workshop, *values: Any) -> Iterator[list[Any]]:
    """Show the plan; what was hardened before is removed."""
    *fields, before = values
    workshop.drop(before)
    gone = [HIDDEN] * 5
    yield [None, None, _shown(views.show_busy("Reading the headers of both models ...")), *gone]
    try:
        order = read_order(*fields, allow_folders=workshop.settings.allow_folders)
        planned: Planned = workshop.plan(order)
    except LoxError as error:
        yield [None, None, _shown(views.show_error(str(error))), *gone]
        return
    yield [planned, None, _shown(views.show_plan(planned)), SHOWN, *gone[1:]]


def _harden(workshop: Workshop, planned: Planned | None, before: Hardened | None) -> Iterator[list[Any]]:
    """Harden what was planned."""
    workshop.drop(before)
    nothing = ["", HIDDEN, HIDDEN]
    if planned is None:
        yield [None, _shown(views.show_error("The plan is not kept any more: show it again.")), HIDDEN, *nothing]
        return
    try:
        for item in workshop.harden(planned):
            if isinstance(item, Hardened):
                report = _shown(views.show_report(item.report, item.warnings))
                yield [item, report, HIDDEN, item.card, SHOWN, SHOWN]
            else:
                yield [None, _shown(views.show_progress(item)), HIDDEN, *nothing]
    except LoxError as error:
        yield [None, _shown(views.show_error(str(error))), SHOWN, *nothing]


def _push(
    workshop: Workshop, hardened: Hardened | None, repo_id: str, token: str, public: bool
) -> Iterator[list[Any]]:
    """Push what was hardened. The token's field is emptied first."""
    yield ["", hardened, _shown(views.show_busy("Uploading ...")), gr.skip()]
    if hardened is None:
        yield ["", None, _shown(views.show_error("The hardened model is not kept any more: harden it again.")), HIDDEN]
        return
    try:
        url = workshop.push(hardened, repo_id, token, public=public)
    except LoxError as error:
        yield ["", hardened, _shown(views.show_error(str(error))), gr.skip()]
        return
    workshop.drop(hardened)
    yield ["", None, _shown(views.show_pushed(url)), HIDDEN]


def _shown(text: str) -> dict[str, Any]:
    return gr.update(value=text, visible=True)
