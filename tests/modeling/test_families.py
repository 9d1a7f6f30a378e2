"""Every dense family of the installed transformers can be an anchor, or is listed in the table of exceptions.

Runs the checks that write no files and do not decode; those that decode on one family of each kind of cache and
attention, and on the others in `make soak`. `make families` (`tests/soak/families_table.py`) runs all of them.
"""

import re
from pathlib import Path

import pytest
import transformers

from flexmoe.meta import build_on_meta
from tests.support.families import EXCEPTIONS, causal_lm_families, tiny_config
from tests.support.family_checks import (
    CHECKS,
    DECODING,
    QUICK,
    anchor_of,
    graft_has_equal_logits,
    run_all,
)
from tests.support.soak import thinned

ROOT = Path(__file__).resolve().parents[2]
ANCHORS = [family for family in causal_lm_families() if family not in EXCEPTIONS]

DECODED = {
    "bamba",  # attention and state-space layers
    "bart",  # the decoder of an encoder-decoder, learned positions
    "bloom",  # ALiBi, a network that adds the residual
    "cpmant",  # position buckets
    "ctrl",  # sinusoidal positions, a Sequential as network
    "doge",  # a dynamic mask
    "falcon_h1",  # attention beside state-space layers
    "gemma3n_text",  # layers that share keys and values
    "gpt_bigcode",  # one key-value head
    "lfm3",  # attention and convolutions
    "minicpm3",  # latent attention
    "olmo_hybrid",  # linear attention
    "openai-gpt",  # no cache
    "prophetnet",  # several streams
    "qwen3_5_text",  # gated linear attention
    "recurrent_gemma",  # recurrent layers
    "xglm",  # sinusoidal positions with an offset
}
"""Of each kind of cache and attention one; the seven of `ANCHOR_CONFIGS` decode in `test_exactness.py`."""


@pytest.mark.parametrize("family", ANCHORS)
def test_family(family: str, tmp_path: Path) -> None:
    graft_has_equal_logits(anchor_of(family))
    for check in QUICK:
        CHECKS[check](family, tmp_path)


@pytest.mark.parametrize("family", thinned(ANCHORS, DECODED & set(ANCHORS)))
def test_family_decodes(family: str, tmp_path: Path) -> None:
    for check in DECODING:
        CHECKS[check](family, tmp_path)


@pytest.mark.parametrize("family", sorted(set(EXCEPTIONS) & set(causal_lm_families())))
def test_exceptions_still_fail(family: str, tmp_path: Path) -> None:
    """A family that passes, or fails for another reason than the listed one, must not be in the table."""
    _reason, pattern = EXCEPTIONS[family]
    with pytest.raises(Exception) as caught:
        _use_as_anchor(family, tmp_path)
    assert re.search(pattern, str(caught.value)), caught.value


def _use_as_anchor(family: str, folder: Path) -> None:
    build_on_meta(tiny_config(family))
    run_all(family, folder)


def test_documented_families_are_up_to_date() -> None:
    """With the transformers version that docs/families.md names, it must list the families that are tested here."""
    document = (ROOT / "docs" / "families.md").read_text()
    if f"transformers {transformers.__version__} knows" not in document:
        assert len(ANCHORS) >= 66
        return
    assert [family for family in ANCHORS if f"| `{family}` | `" not in document] == []
    assert len(re.findall(r"^\| `\S+` \| `", document, re.MULTILINE)) == len(ANCHORS) >= 66
