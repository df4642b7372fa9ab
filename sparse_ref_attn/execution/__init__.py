"""Where the saving happens: rows dropped at the transformer's input or at a block, or stored reference K/V."""

from .cache import CACHE_ROWS, PERS, RESTS, Cache
from .settings import EXECUTIONS, PROFILES, Execution, execution
from .tokens import Tokens

__all__ = ["CACHE_ROWS", "EXECUTIONS", "PERS", "PROFILES", "RESTS", "Cache", "Execution", "Tokens", "execution"]
