"""An execution from its name and the fields said beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..checks import is_int, is_one_of
from ..errors import ConfigError
from ..isolation import Isolation
from ..vocabulary import chosen
from .cache import CACHE_ROWS, LAYERS, PERS, RESTS, Cache
from .tokens import Tokens

__all__ = ["EXECUTIONS", "PROFILES", "Execution", "execution"]

EXECUTIONS = ("tokens", "cache", "both")
PROFILES = ("step", "in_flight")
NAMES = {"profile": PROFILES, "cache_rows": CACHE_ROWS, "per": PERS, "rest": RESTS}

Execution = Tokens | Cache


def execution(way: object, settings: Mapping[str, Any]) -> Execution:
    """The execution that ``SparseRef(execute=way, **settings)`` means.

    Parameters
    ----------
    way : Tokens, Cache, or {"tokens", "cache", "both"}
    settings : mapping
        from_block, profile, profile_blocks, cache_rows, layers, rerank_every, refresh, per, tile, rest, cell,
        isolated, as far as they are given (not None); rest is "none" for no means.

    Examples
    --------
    >>> execution("both", {"layers": (1.0, 0.5)}).first
    'kept'
    """
    if not isinstance(way, (Tokens, Cache)):
        if not is_one_of(way, EXECUTIONS):
            raise ConfigError(
                f"execute must be one of {', '.join(EXECUTIONS)}, got {way!r}, which is no Tokens or Cache either"
            )
        way = Tokens() if way == "tokens" else Cache("all" if way == "cache" else "kept")
    given = {name: value for name, value in settings.items() if value is not None}
    for name, choices in NAMES.items():
        if isinstance(given.get(name), str):
            given[name] = chosen(name, given[name], choices)
    profile, blocks = given.pop("profile", None), given.pop("profile_blocks", None)
    if profile is not None and not is_one_of(profile, PROFILES):
        raise ConfigError(f'profile must be "step" or "in_flight", got {profile!r}')
    if isinstance(way, Cache):
        from_block = given.pop("from_block", 0)
        if from_block != 0:
            raise ConfigError(
                f'from_block goes with execute="tokens" only, got {way.name!r} and from_block={from_block}'
            )
        if profile == "in_flight":
            raise ConfigError(
                'profile="in_flight" goes with execute="tokens" and without rerank_every, got '
                f"{way.name!r} and {given.get('rerank_every')}"
            )
        given |= {"rows": given.pop("cache_rows")} if "cache_rows" in given else {}
        if isinstance(given.get("isolated"), Mapping):
            given["isolated"] = Isolation.from_dict(given["isolated"])
        if is_one_of(given.get("rest"), RESTS[-1:]):
            given["rest"] = None
    else:
        if "layers" in given:
            raise ConfigError(LAYERS.format(given["layers"], way.name))
        if "refresh" in given:
            raise ConfigError(f'refresh goes with execute="cache" or "both" only, got it with {way.name!r}')
        if given.pop("isolated", False):
            raise ConfigError(f'isolated must come with execute="cache", got it with {way.name!r}')
        of_tiles = [name for name in ("per", "tile", "rest", "cell") if given.pop(name, "run") != "run"]
        if of_tiles:
            raise ConfigError(f'{" and ".join(of_tiles)} must come with execute="cache", got it with {way.name!r}')
        if given.pop("cache_rows", "budget") != "budget":
            raise ConfigError('cache_rows goes with execute="cache" or "both" only, got it with \'tokens\'')
        if profile is not None:
            way = replace(way, in_flight=profile == "in_flight")
    if blocks is not None:
        if not is_int(blocks, 1):
            raise ConfigError(f"profile_blocks must be an int of at least 1, got {blocks!r}")
        if isinstance(way, Cache) or not way.in_flight:
            raise ConfigError(f'profile_blocks counts blocks with profile="in_flight" only, got {blocks}')
        way = replace(way, in_flight=blocks)
    return replace(way, **given)
