"""The examples in docs/peft.md run, one after the other, on a tiny model."""

import re
from pathlib import Path

import pytest

from flexmoe.testing import tiny_flexmoe

ROOT = Path(__file__).resolve().parents[1]


def examples(document: str) -> list[str]:
    """The fenced Python blocks of a document."""
    return re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / document).read_text(), flags=re.M | re.S)


@pytest.mark.filterwarnings("error:.*owners at once")
def test_the_examples_of_peft_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_flexmoe("llama", ["math", "code"]).save_pretrained("model")
    blocks = examples("peft.md")
    assert len(blocks) == 4
    scope: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "docs/peft.md", "exec"), scope)
    adapted = scope["adapted"]
    assert adapted.base_model.active_adapters == ["default", "for-two"]
    assert adapted.expert_names == ["public", "math", "math-2"]
    adapted.save_pretrained("both")
    saved = {str(path.parent) for path in Path("both").rglob("adapter_model.safetensors")}
    assert saved == {"both", "both/for-two"}
