"""The files beside the weights on the way through all conversions, to a push: the same ones everywhere."""

import json
from pathlib import Path

import pytest

from flexmoe.companions import companions
from flexmoe.conversion.compose import compose
from flexmoe.conversion.export import export
from flexmoe.conversion.graft import graft
from flexmoe.conversion.import_flex_olmo import import_flex_olmo
from flexmoe.hub.publish import plan_upload
from flexmoe.modeling import FlexMoeForCausalLM
from flexmoe.testing import tiny_anchor
from tests.support.letters import letter_tokenizer

TEXTS = (
    *("LICENSE", "LICENCE-MIT.txt", "NOTICE", "Notice.md", "COPYING", "TERMS_OF_USE.md", "USE_POLICY.md"),
    *("chat_template.jinja", "chat_template_tools.jinja", "additional_chat_templates/rag.jinja"),
)
OTHERS = ("LICENSES.zip", "LICENSE.pem", "chat_template.bak", "notes.txt", "scores.json", "modeling_other.py")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An anchor with companions and other files, and what each conversion makes of the one before it."""
    work = tmp_path_factory.mktemp("companions")
    tiny_anchor("olmo2").save_pretrained(work / "anchor")
    letter_tokenizer().save_pretrained(work / "anchor")
    (work / "anchor" / "generation_config.json").write_text('{"temperature": 0.25}')
    (work / "anchor" / "chat_template.json").write_text('{"chat_template": "{{ messages }}"}')
    (work / "anchor" / "additional_chat_templates").mkdir()
    for name in (*TEXTS, *OTHERS):
        (work / "anchor" / name).write_text(f"Text of {name}.")
    (work / "public.txt").write_text("text")
    grafted = graft(work / "anchor", work / "grafted", public_data=[work / "public.txt"])
    model = FlexMoeForCausalLM.from_pretrained(grafted)
    model.add_expert_copy("math")
    package = model.save_expert("math", work / "math", license="mit")
    return {
        "grafted": grafted,
        "composed": compose(grafted, [package], work / "composed", verify=False),
        "dense": export(grafted, work / "dense", to="dense", expert="public"),
        "native": export(grafted, work / "native", to="flex_olmo", drop_bias=True),
        "imported": import_flex_olmo(work / "native", work / "imported", names=["public"]) / "model",
    }


@pytest.mark.promise(
    "`graft`, `compose`, `export`, `import`",
    "licence, notice, terms and any chat template beside the weights",
    "copied; a push sends the same files",
)
@pytest.mark.parametrize("name", ["grafted", "composed", "dense", "native", "imported"])
def test_every_conversion_keeps_them(folders: dict[str, Path], name: str) -> None:
    folder = folders[name]
    anchor = folders["grafted"].parent / "anchor"
    expected = companions(anchor).keys()
    assert {*TEXTS, "generation_config.json", "chat_template.json", "tokenizer.json"} <= expected
    found = companions(folder)
    assert found.keys() == expected
    assert all(found[text].read_text() == f"Text of {text}." for text in TEXTS)
    assert not any((folder / other).exists() for other in OTHERS)
    if json.loads((folder / "config.json").read_text())["model_type"] == "flexmoe":
        plan = plan_upload(folder)
        assert expected <= {file.name for file in plan.files}
        assert plan.left_out == ()


@pytest.mark.parametrize("name", ["grafted", "composed"])
def test_the_public_sample_stays_with_the_model(folders: dict[str, Path], name: str) -> None:
    assert "public_sample.jsonl" in {file.name for file in plan_upload(folders[name]).files}


@pytest.mark.parametrize("name", ["dense", "native", "imported"])
def test_an_export_has_no_public_sample(folders: dict[str, Path], name: str) -> None:
    assert not (folders[name] / "public_sample.jsonl").exists()
