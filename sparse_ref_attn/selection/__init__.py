"""Which reference tokens matter: selectors, and rankings made from their scores.

Examples
--------
>>> from sparse_ref_attn.selection import Mix, Edges, Grid
>>> Mix({Edges(): 3.0, Grid(): 1.0}).probes()
()
"""

from .attention import AttentionMass, SelfAttention
from .base import FromFunction, Probe, Reduced, Reducer, References, Selector
from .combine import Mix, Union
from .edges import Edges, canny
from .learned import Learned
from .masks import Boxes, SubjectMask
from .names import selector
from .ranking import fingerprint, order, per_reference, prefix
from .saliency import Saliency, saliency_map
from .saved_ranking import Ranking, SavedRanking
from .similarity import Cosine
from .uniform import Grid, Random, spread_order

__all__ = [
    "AttentionMass",
    "Boxes",
    "Cosine",
    "Edges",
    "FromFunction",
    "Grid",
    "Learned",
    "Mix",
    "Probe",
    "Random",
    "Ranking",
    "Reduced",
    "Reducer",
    "References",
    "Saliency",
    "SavedRanking",
    "Selector",
    "SelfAttention",
    "SubjectMask",
    "Union",
    "canny",
    "fingerprint",
    "order",
    "per_reference",
    "prefix",
    "saliency_map",
    "selector",
    "spread_order",
]
