"""Models that are refused by name, each with its reason."""

from __future__ import annotations

import pytest

import sparse_ref_attn as sra
from sparse_ref_attn.adapters.classes import load_class
from sparse_ref_attn.errors import UnsupportedModelError
from sparse_ref_attn.models import adapter_for, supported
from sparse_ref_attn.models.refused import REFUSED
from sparse_ref_attn.models.registry import _REGISTRY


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_with_its_reason(name: str) -> None:
    cls = load_class(name)
    assert name not in supported()
    for kind in (cls, type("Tuned", (cls,), {})):
        with pytest.raises(UnsupportedModelError) as error:
            adapter_for(object.__new__(kind))
        assert str(error.value).endswith(REFUSED[name])
        assert kind.__name__ in str(error.value)


def test_an_adapter_of_somebodys_own_serves_it() -> None:
    name = next(iter(REFUSED))
    own = sra.PlainAdapter("hidden_states", lambda kwargs: None)
    try:
        sra.register_adapter(name, own)
        assert adapter_for(object.__new__(load_class(name))) is own
    finally:
        _REGISTRY.pop(name)
