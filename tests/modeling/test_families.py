"""Every dense family of the installed transformers can be an anchor, or is listed in the table of exceptions.

Runs the checks that write no files; `make families` (`tests/soak/families_table.py`) runs all of them.
"""

import re
from pathlib import Path

import pytest
import transformers

from flexmoe.modeling import build_on_meta
from tests.support.families import EXCEPTIONS, causal_lm_families, tiny_config
from tests.support.family_checks import CHECKS, QUICK, run_all

ROOT = Path(__file__).resolve().parents[2]
ANCHORS = [family for family in causal_lm_families() if family not in EXCEPTIONS]


@pytest.mark.parametrize("family", ANCHORS)
def test_family(family: str, tmp_path: Path) -> None:
    for check in QUICK:
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
