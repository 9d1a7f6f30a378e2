"""Every causal family of transformers with every tokenizer class that it or a checkpoint may name."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.flexmoe.test_tokenization import test_a_graft_reads_the_tokens_of_its_anchor as check
from tests.support.tokenizer_files import cases


@pytest.mark.parametrize(("family", "kind", "declared"), list(cases(every=True)))
def test_every_family_with_every_class(tmp_path: Path, family: str, kind: str, declared: str | None) -> None:
    check(tmp_path, family, kind, declared)
