"""The examples in the layers' docstrings run, and print what they say."""

import doctest
import importlib
import pkgutil

import pytest

import frugax

MODULES = [module.name for module in pkgutil.iter_modules(frugax.layers.__path__)]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    module = importlib.import_module(f"frugax.layers.{name}")
    assert doctest.testmod(module, optionflags=doctest.ELLIPSIS).failed == 0


def test_everything_public_has_an_example_and_a_source():
    for name in frugax.layers.__all__:
        thing = getattr(frugax.layers, name)
        if name in ("LayerNorm", "DecoderState", "Mixer"):  # Flax's own, a tuple, and what mixers inherit
            continue
        assert ">>>" in thing.__doc__, name
        assert "Source:" in thing.__doc__ or name in ("Block", "Decoder", "positions"), name
