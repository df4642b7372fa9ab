"""What is known of a class of pipelines."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

from ..errors import ConfigError
from .classes import load_class
from .training_hooks import TrainingHooks

__all__ = ["PipelineFacts"]


@dataclass(frozen=True)
class PipelineFacts:
    """One published class of pipelines; what derives from it is known alike.

    Parameters
    ----------
    cls : str
        Its public name, such as "diffusers.FluxKontextPipeline": in whichever of the package's modules it stands.
    references : (int, int or None)
        Least and most references of one picture; None: any number.
    edits : bool
        Whether its call is a prompt and the references alone, so that the command line and `eval` can make it. Default
        True; False of inpainting.
    area : str, optional
        Argument of the call with the pixels of the output, to which the pipeline scales it whatever its height and
        width.
    shaped_by : int
        Which reference gives the output its shape where nobody says a size, as an index. Default: the first.
    distilled : bool
        Whether all of its models are distilled to few steps. Default: those whose config says ``is_distilled``.
    packed : int
        Side of a token in the VAE's cells.
    default_steps : int, optional
        Steps of a call where nobody says how many; default what its class's signature says, which a modular pipeline's
        does not.
    training : TrainingHooks, optional
        How its models are trained on pairs of pictures; None: `sra train` does not train them.
    """

    cls: str
    references: tuple[int, int | None]
    edits: bool = True
    area: str | None = None
    shaped_by: int = 0
    distilled: bool = False
    packed: int = 2
    default_steps: int | None = None
    training: TrainingHooks | None = None

    @property
    def name(self) -> str:
        return self.cls.rpartition(".")[2]

    def describes(self, cls: type) -> bool:
        """Whether it is this class, not what derives from it.

        Examples
        --------
        >>> PipelineFacts("collections.OrderedDict", (0, 1)).describes(dict)
        False
        """
        package, _, name = self.cls.rpartition(".")
        return cls.__qualname__ == name and f"{cls.__module__}.".startswith(f"{package}.")

    @property
    def several(self) -> bool:
        """Whether a list of images is several references of one picture."""
        return self.references[1] != 1

    def check_references(self, count: int) -> None:
        """Raise ConfigError for more references than one picture takes."""
        most = self.references[1]
        if most is not None and count > most:
            takes = "one reference image" if most == 1 else f"at most {most} reference images"
            raise ConfigError(f"{self.name} takes {takes}, got {count}")

    def steps(self, distilled: bool | None = None) -> int:
        """Steps of a call where nobody says how many: its class's default, 4 of a distilled model.

        Parameters
        ----------
        distilled : bool, optional
            The pipeline's ``is_distilled``.
        """
        if self.distilled if distilled is None else distilled:
            return _DISTILLED_STEPS
        if self.default_steps is not None:
            return self.default_steps
        return int(inspect.signature(load_class(self.cls).__call__).parameters["num_inference_steps"].default)


_DISTILLED_STEPS = 4
