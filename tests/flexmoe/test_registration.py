"""What stands in the Auto classes' mappings passes for the model classes, wherever they are used as classes."""

import pickle

import pytest
from transformers import AutoModel, AutoModelForCausalLM

from flexmoe import FlexMoeConfig, FlexMoeForCausalLM, FlexMoeModel
from flexmoe.testing import tiny_flexmoe


@pytest.mark.parametrize(("auto", "cls"), [(AutoModel, FlexMoeModel), (AutoModelForCausalLM, FlexMoeForCausalLM)])
def test_the_entry_passes_for_the_class(auto, cls):
    entry = auto._model_mapping[FlexMoeConfig]
    assert entry == cls
    assert cls == entry
    assert hash(entry) == hash(cls)
    assert entry.__name__ == cls.__name__
    assert issubclass(cls, entry)
    assert not issubclass(int, entry)
    assert pickle.loads(pickle.dumps(entry)) == cls

    class Derived(entry):
        pass

    assert Derived.__mro__[1] is cls
    assert isinstance(tiny_flexmoe("llama"), entry) is (cls is FlexMoeForCausalLM)
