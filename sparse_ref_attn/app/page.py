"""The page: what is asked on one side, what was made on the other; everything that it does is `Session`'s."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gradio as gr

from ..eval.ways import WAYS
from ..execution import EXECUTIONS
from ..vocabulary import EDITS
from .edit import Edit
from .handlers import Handlers
from .session import Session

__all__ = ["STYLE", "build", "theme"]

STYLE = """
.gradio-container { max-width: 1280px !important; margin: 0 auto !important; }
#photos .grid-container { grid-template-columns: repeat(3, minmax(0, 1fr)) !important; }
.sra-said .sra-said { border: none !important; padding: 0 !important; }
.sra-error { border-left: 4px solid #c0392b !important; padding-left: 12px !important; }
.sra-picture .image-container { padding-top: 32px; }
.sra-made img { width: 100%; height: 100%; object-fit: contain; }
.sra-numbers table { width: 100%; border-collapse: collapse; border: none !important;
  font-variant-numeric: tabular-nums; }
.sra-numbers :is(table, thead, tbody, tr) { border: none !important; }
.sra-numbers table :is(td, th) { border: none !important; border-bottom: 1px solid #8884 !important; }
.sra-numbers :is(td, th):not(:first-child) { text-align: right; }
.sra-numbers :is(td, th):nth-child(2), .sra-numbers :is(td, th):nth-child(3) { white-space: nowrap; }
footer { display: none !important; }
@media (max-width: 640px) {
  .sra-numbers table { font-size: 12px; }
  .sra-numbers :is(td, th) { padding: 4px 3px !important; }
}
"""
"""Of the page, beside the theme's own."""

_INTO_VIEW = """() => {
  const shown = document.querySelector(".sra-error") ? "said" : "sparse";
  document.getElementById(shown).scrollIntoView({block: "nearest", behavior: "smooth"});
}"""
"""On a narrow screen what was made, or what was wrong, lies out of sight."""

DEFAULT = "the rule's own"
SINGLE = tuple(task for task in EDITS if task != "pair")
"""Examples of the small model that have one photo."""


def theme() -> Any:
    """Plain, with the fonts that a system has: nothing is fetched for it."""
    system = ("system-ui", "sans-serif")
    return gr.themes.Default(primary_hue="blue", font=system, font_mono=("ui-monospace", "monospace"))


def build(session: Session, *, choose_model: bool = True) -> Any:
    """The page of a session.

    Parameters
    ----------
    session : Session
        With a model loaded, or none yet.
    choose_model : bool
        Whether whoever sees the page may load another model.

    Returns
    -------
    gradio.Blocks
        Not launched; runs wait for each other.
    """
    do = Handlers(session)
    with gr.Blocks(title="Sparse references", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        made = gr.State(None)
        gr.Markdown("# Sparse references\nEdit photos on the reference tokens that matter.")
        with gr.Row(equal_height=False):
            with gr.Column(scale=2, min_width=260):
                asked = _asked()
                with gr.Row():
                    start = _button("Edit", "edit", variant="primary")
                    stop = _button("Stop", "stop")
                said = gr.Markdown(session.status(), elem_classes=["sra-said"], elem_id="said")
                drawn = _examples(session)
            with gr.Column(scale=3, min_width=260):
                with gr.Row():
                    sparse = _picture("On the tokens kept", "sparse", made=True)
                    dense = _picture("With every token", "dense", made=True, visible=False)
                with gr.Row():
                    beside = _button("Dense beside it", "beside", interactive=False)
                    undo = _button("Undo the patch", "undo", interactive=False)
                numbers = gr.Markdown(elem_classes=["sra-numbers"], elem_id="numbers")
                kept = _picture("Tokens that were read are bright", "kept", visible=False)
        model = _model(session) if choose_model else None
        shown = [said, made, sparse, dense, kept, numbers, beside, undo]
        one = {"concurrency_limit": 1, "concurrency_id": "model", "api_visibility": "private"}
        for event in (start.click, asked["prompt"].submit):
            _on(event, do.run, list(asked.values()), shown, one, sparse).success(None, js=_INTO_VIEW)
        _on(beside.click, do.dense, [made], shown, one, dense)
        _on(undo.click, do.undo, [], [said, undo], one, said)
        stop.click(do.stop, queue=False, api_visibility="private", show_progress="hidden")
        task, draw, group = drawn
        _on(draw.click, do.example, [task, asked["seed"]], [said, asked["images"], asked["prompt"]], one, said)
        if model is not None:
            path, load, small = model
            after = [said, made, sparse, dense, kept, numbers, beside, undo, group]
            _on(load.click, do.load, [path], after, one, said)
            _on(small.click, do.load_small, [], after, one, said)
        page.load(do.status, outputs=[said], queue=False, api_visibility="private", show_progress="hidden")
    return page.queue(max_size=32)


def _on(
    event: Callable[..., Any], do: Callable[..., Any], inputs: list[Any], outputs: list[Any], one: Any, on: Any
) -> Any:
    return event(do, inputs=inputs, outputs=outputs, show_progress="full", show_progress_on=[on], **one)


def _asked() -> dict[str, Any]:
    """What an edit needs, by the names of `Handlers.run`."""
    images = gr.Gallery(
        label="Photos", type="filepath", file_types=["image"], columns=3, height=200, object_fit="contain",
        fit_columns=False, format="png",
        interactive=True, elem_id="photos", sources=["upload"], buttons=[],
    )  # fmt: skip
    prompt = gr.Textbox(label="Prompt", lines=2, max_lines=6, elem_id="prompt", submit_btn=False)
    way = gr.Dropdown(list(WAYS), value=Edit.way, label="Preset or rule", elem_id="way")
    share = gr.Slider(
        1, 100, value=100 * Edit.share, step=1, label="Share of the reference tokens, %", elem_id="share",
        info="Mean over all steps, a dense one included; faithful, balanced and fast keep all",
    )  # fmt: skip
    with gr.Accordion("Advanced", open=False, elem_id="advanced"):
        with gr.Row():
            steps = gr.Number(None, label="Steps", info="Empty: the model's own", precision=0, minimum=1, min_width=120)
            seed = gr.Number(0, label="Seed", info="Of the noise", precision=0, minimum=0, min_width=120)
        with gr.Row():
            width = gr.Number(
                None, label="Width", info="One alone keeps the shape", precision=0, minimum=16, min_width=120
            )
            height = gr.Number(
                None, label="Height", info="Empty: the model's own", precision=0, minimum=16, min_width=120
            )
        execute = gr.Dropdown(
            [DEFAULT, *EXECUTIONS], value=DEFAULT, label="Execution", elem_id="execute",
            info="tokens: the rest is dropped. cache: references run now and then, what is stored is read. both.",
        )  # fmt: skip
        refresh = gr.Textbox(
            label="Refresh of a cache", placeholder="25%, 4, 0,4,8, never or drift:0.3", elem_id="refresh",
            info="When references run again. Empty: the cache's own",
        )  # fmt: skip
    return {
        "images": images, "prompt": prompt, "way": way, "share": share, "steps": steps, "seed": seed,
        "width": width, "height": height, "execute": execute, "refresh": refresh,
    }  # fmt: skip


def _examples(session: Session) -> tuple[Any, Any, Any]:
    """What the small model can be asked."""
    shown = session.model is not None and session.model.small
    with gr.Accordion("Examples of the small model", open=True, visible=shown, elem_id="examples") as group:
        gr.Markdown(
            "It was trained on one procedural task and is no FLUX: its prompts are rows of known words. "
            "An example has a subject that it never saw; the seed draws another."
        )
        with gr.Row(equal_height=True):
            task = gr.Dropdown(list(SINGLE), value=SINGLE[0], label="Task", min_width=120, elem_id="task")
            draw = _button("Draw an example", "draw")
    return task, draw, group


def _model(session: Session) -> tuple[Any, Any, Any]:
    """Another model in place of this one."""
    with gr.Accordion("Model", open=session.model is None, elem_id="model"):
        path = gr.Textbox(
            label="Directory of save_pretrained, or hub id", elem_id="path",
            info="FLUX.1 Kontext, FLUX.2, Klein, Qwen-Image-Edit. The one before leaves the memory.",
        )  # fmt: skip
        with gr.Row():
            load = _button("Load", "load")
            small = _button("The small one", "small")
    return path, load, small


def _picture(label: str, name: str, made: bool = False, visible: bool = True) -> Any:
    """`made`: as high as it is wide enough for, however small the picture."""
    return gr.Image(
        label=label, type="pil", format="png", interactive=False, visible=visible, elem_id=name, min_width=240,
        height=380 if made else None, elem_classes=["sra-picture", "sra-made"] if made else ["sra-picture"],
        buttons=["download", "fullscreen"],
    )  # fmt: skip


def _button(words: str, name: str, **settings: Any) -> Any:
    return gr.Button(words, elem_id=name, min_width=120, **settings)
