"""What training must be told of a pipeline, so that its models learn from pairs of pictures: one subclass each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

__all__ = ["TrainingHooks"]


class TrainingHooks:
    """How a pair and its prompt become a call of the transformer.

    The target's rows come first, then the reference's, each as `Adapter.encode` makes them. The model is given them
    with a timestep in [0, 1] and predicts noise minus target.
    """

    max_text: ClassVar[int]
    """Most tokens of a prompt."""
    lora: ClassVar[tuple[str, ...]] = (
        "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
    )  # fmt: skip
    """Ends of the names of the Linear layers that get a LoRA; by default the projections of joint attention."""

    def arguments(
        self, pipe: Any, grids: Sequence[tuple[int, int]], prompts: list[str], references: Tensor, text_tokens: int
    ) -> dict[str, Any]:
        """The model's other arguments: prompts and positions, without ``guidance``.

        Parameters
        ----------
        pipe : diffusers pipeline
        grids : sequence of (int, int)
            Rows and columns of tokens of the target and of the reference.
        prompts : list of str
            B of them.
        references : Tensor
            (B, 3, height, width) pictures, -1 to 1, for a text encoder that sees them.
        text_tokens : int
            Length that the prompts are padded or cut to.
        """
        raise NotImplementedError
