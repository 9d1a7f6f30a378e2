"""Every causal family of transformers with every tokenizer class that it or a checkpoint may name."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING

from tests.flexmoe.test_tokenization import test_a_graft_reads_the_tokens_of_its_anchor as check
from tests.support.tokenizer_files import WITHOUT_DEFAULTS, cases


@pytest.mark.parametrize(("family", "kind", "declared"), list(cases(every=True)))
def test_every_family_with_every_class(tmp_path: Path, family: str, kind: str, declared: str | None) -> None:
    check(tmp_path, family, kind, declared)


@pytest.mark.parametrize("family", WITHOUT_DEFAULTS)
def test_the_families_left_out_have_no_default_config(family: str) -> None:
    with pytest.raises(StrictDataclassError, match="hidden_size_per_layer_input"):
        CONFIG_MAPPING[family]()
