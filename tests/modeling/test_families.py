"""Every dense family of the installed transformers is an anchor, or stands in the table of exceptions.

Here run the checks that need no files; `tests/soak/test_families.py` runs all of them.
"""

import re
from pathlib import Path

import pytest
import transformers

from flexmoe.modeling import build_on_meta
from tests.families import EXCEPTIONS, causal_lm_families, tiny_config
from tests.family_checks import CHECKS, QUICK, run_all

ROOT = Path(__file__).resolve().parents[2]
ANCHORS = [family for family in causal_lm_families() if family not in EXCEPTIONS]


@pytest.mark.parametrize("family", ANCHORS)
def test_family(family: str, tmp_path: Path) -> None:
    for check in QUICK:
        CHECKS[check](family, tmp_path)


@pytest.mark.parametrize("family", sorted(set(EXCEPTIONS) & set(causal_lm_families())))
def test_an_exception_is_one(family: str, tmp_path: Path) -> None:
    """A family that works, or fails in another way than the table says, must leave the table."""
    _reason, pattern = EXCEPTIONS[family]
    with pytest.raises(Exception) as caught:
        _make_an_anchor_of(family, tmp_path)
    assert re.search(pattern, str(caught.value)), caught.value


def _make_an_anchor_of(family: str, folder: Path) -> None:
    build_on_meta(tiny_config(family))
    run_all(family, folder)


def test_the_documented_families_are_these() -> None:
    """`make families` writes the table; with the transformers that it names, it must list what is walked here."""
    document = (ROOT / "docs" / "families.md").read_text()
    if f"transformers {transformers.__version__} knows" not in document:
        assert len(ANCHORS) >= 66
        return
    assert [family for family in ANCHORS if f"| `{family}` | `" not in document] == []
    assert len(re.findall(r"^\| `\S+` \| `", document, re.MULTILINE)) == len(ANCHORS) >= 66
