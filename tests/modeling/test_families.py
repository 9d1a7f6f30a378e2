"""Every dense family of the installed transformers can be an anchor, or is listed in the table of exceptions.

Runs the checks that write no files and do not decode on one family of each structure, those that decode on one of
each kind of cache and attention, and both on the others in `make soak`. `make families`
(`tests/soak/families_table.py`) runs all of them.
"""

import functools
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


LIKE = {
    "bamba": {"falcon_h1"},
    "bart": {
        *("bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "mvp", "pegasus", "plbart", "trocr"),
        "whisper",
    },
    "codegen": {"gptj"},
    "cohere": {"cohere2", "cohere_compass_text"},
    "gemma2": {"beam", "gemma3_text", "gemma4_unified_text"},
    "gemma3": {"gemma4_unified"},
    "got_ocr2": {"moss_transcribe_diarize"},
    "gpt2": {"gpt-sw3"},
    "gpt_bigcode": {"gpt_neo"},
    "jais2": {"arcee", "nemotron"},
    "llama": {
        *("cwm", "diffllama", "ernie4_5", "flint", "gemma", "granite_swa", "helium", "hunyuan_v1_dense", "internlm3"),
        *("iquestcoder", "ministral", "ministral3", "mistral", "olmo", "qwen2", "qwen3", "seed_oss", "smollm3"),
        "youtu",
    },
    "olmo2": {"exaone4", "olmo3"},
    "phi3": {"glm", "phi4_multimodal"},
    "qwen3_5_text": {"qwen3_5"},
}
"""The families whose decoder layers have the networks and norms of another one: `make soak` alone runs them.

A family of this structure that is not listed multiplies its residual, adds in parallel, or has another cache.
"""

LIKE_ANOTHER = {family: first for first, families in LIKE.items() for family in families}


@pytest.mark.parametrize("family", thinned(ANCHORS, set(ANCHORS) - set(LIKE_ANOTHER)))
def test_family(family: str, tmp_path: Path) -> None:
    graft_has_equal_logits(anchor_of(family))
    for check in QUICK:
        CHECKS[check](family, tmp_path)


@pytest.mark.parametrize("family", sorted(set(ANCHORS) & set(LIKE_ANOTHER)))
def test_a_family_like_another_has_the_same_structure(family: str) -> None:
    assert structure(family) == structure(LIKE_ANOTHER[family])


@functools.cache
def structure(family: str) -> tuple[str, set[tuple]]:
    """The name of the list of layers; for each layer: the network's parts, by name and class, and its norms.

    A class is the family's own, which names it differently, or one of torch.
    """
    dense, sites = build_on_meta(tiny_config(family))
    layers = set()
    for site in sites:
        parts = tuple(
            (name, type(module).__name__ if type(module).__module__.startswith("torch.") else "of the family")
            for name, module in site.ffn(dense).named_modules()
            if name and not list(module.children())
        )
        norms = tuple(name for name, _ in dense.get_submodule(site.layer).named_children() if "norm" in name)
        layers.add((site.attributes, parts, norms))
    return sites[0].layer.rpartition(".")[0], layers


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
