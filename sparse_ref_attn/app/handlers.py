"""What the page's buttons do: values of its fields in, values of what it shows out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import gradio as gr

from ..execution import EXECUTIONS
from .edit import Edit
from .model import SMALL, example
from .session import Made, Session
from .words import in_words

__all__ = ["Handlers"]


class Handlers:
    """The handlers of one session's page; an error is a sentence on the page, and what was shown before stays.

    Parameters
    ----------
    session : Session
    """

    def __init__(self, session: Session) -> None:
        self._session = session

    def run(
        self,
        images: Sequence[Any] | None,
        prompt: str,
        way: str,
        share: float,
        steps: float | None,
        seed: float | None,
        width: float | None,
        height: float | None,
        execute: str,
        refresh: str,
        progress: gr.Progress = gr.Progress(),  # noqa: B008 -- how gradio hands it over
    ) -> list[Any]:
        """Edit; the fields of the page in its order."""

        def edit() -> Made:
            asked = Edit(
                images=tuple(_path(image) for image in images or ()),
                prompt=prompt or "",
                way=way,
                share=share / 100,
                steps=None if not steps else int(steps),
                seed=int(seed or 0),
                width=int(width) if width else None,
                height=int(height) if height else None,
                execute=execute if execute in EXECUTIONS else None,
                refresh=refresh or "",
            )
            return self._session.run(asked, _shown_by(progress))

        return self._made(edit)

    def dense(self, made: Made | None, progress: gr.Progress = gr.Progress()) -> list[Any]:  # noqa: B008
        """The same edit with every token."""
        if made is None:
            return self._failed("There is nothing to compare with yet: edit first.", 7)
        return self._made(lambda: self._session.dense(made, _shown_by(progress)))

    def undo(self) -> list[Any]:
        """Take the patch off."""
        self._session.undo()
        return [self._said(), gr.Button(interactive=False)]

    def stop(self) -> None:
        """End the run that goes on."""
        self._session.stop()

    def status(self) -> Any:
        """What a page that is opened says first."""
        return self._said()

    def example(self, task: str, seed: float | None) -> list[Any]:
        """A photo and a prompt for the small model."""
        try:
            picture, prompt = example(task, int(seed or 0))
        except Exception as error:
            return self._failed(in_words(error), 2)
        return [self._said(), [picture], prompt]

    def load(self, path: str) -> list[Any]:
        """Another model, and an empty page for it."""
        try:
            self._session.load((path or "").strip())
        except Exception as error:
            told = f"{in_words(error)} {self._session.status()}"
            if self._session.model is not None:  # the one before is still there
                return self._failed(told, 8)
            return [_error(told), *_empty(), gr.Accordion(visible=False)]
        model = self._session.model
        return [self._said(), *_empty(), gr.Accordion(visible=model is not None and model.small)]

    def load_small(self) -> list[Any]:
        """The small model in place of the one that is loaded."""
        return self.load(SMALL)

    def _made(self, make: Callable[[], Made]) -> list[Any]:
        try:
            made = make()
            result, overlay = made.result, made.overlay()
            numbers = _table(made.rows(), made.notes())
        except Exception as error:
            return self._failed(in_words(error), 7, undo=True)
        return [
            self._said(),
            made,
            result.sparse_image,
            gr.Image(result.dense_image, visible=result.dense_image is not None),
            gr.Image(overlay, visible=overlay is not None),
            numbers,
            gr.Button(interactive=True),
            gr.Button(interactive=self._session.patched),
        ]

    def _failed(self, told: str, others: int, undo: bool = False) -> list[Any]:
        """The error, and everything else as it is; `undo`: the last of them is the button that takes the patch off."""
        rest: list[Any] = [gr.skip()] * others
        if undo:
            rest[-1] = gr.Button(interactive=self._session.patched)
        return [_error(told), *rest]

    def _said(self) -> Any:
        return gr.Markdown(self._session.status(), elem_classes=["sra-said"])


def _error(told: str) -> Any:
    return gr.Markdown(told, elem_classes=["sra-said", "sra-error"])


def _empty() -> list[Any]:
    """Everything that an edit shows, of no edit."""
    gone, off = gr.Image(None, visible=False), gr.Button(interactive=False)
    return [None, None, gone, gone, "", off, off]


def _path(image: Any) -> str:
    """The file of a gallery's entry."""
    return str(image[0] if isinstance(image, (tuple, list)) else image)


def _shown_by(progress: gr.Progress) -> Callable[[str, int, int], None]:
    def told(what: str, step: int, steps: int) -> None:
        progress((step, steps), desc=f"{what}: step {step} of {steps}", unit="steps")

    return told


def _table(rows: Sequence[tuple[str, str, str, str]], notes: Sequence[str]) -> str:
    """Markdown of the numbers and the notes under them."""
    head, *body = rows
    lines = [" | ".join(("", *head, "")).strip(), "|---|--:|--:|--:|"]
    lines += ["| " + " | ".join(cell.strip() for cell in row) + " |" for row in body]
    return "\n".join([*lines, "", *(f"- {note}" for note in notes)])
