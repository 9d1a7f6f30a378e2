"""`flexmoe.graft` with router data: rows route text to its expert; the anchor is loaded at most once."""

import random
from pathlib import Path

import pytest
import torch

import flexmoe
from flexmoe.data import read_public_sample
from flexmoe.modeling import FlexMoeForCausalLM
from flexmoe.routers.hidden_states import RowText, collect_states, fit_rows
from flexmoe.routers.rows import row_method
from flexmoe.testing import random_tokens, tiny_anchor, tiny_flexmoe
from flexmoe_cli import main
from tests.support.letters import letter_tokenizer

LETTERS = {"math": "abcdef", "code": "uvwxyz", "public": "abcdefghijklmnopqrstuvwxyz"}


def write(path: Path, letters: str, seed: int, length: int = 1500) -> Path:
    path.write_text("".join(random.Random(seed).choices(letters + " ", k=length)))
    return path


@pytest.fixture(params=["llama"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An anchor, and text of letters: math has the first ones, code the last, public all."""
    monkeypatch.chdir(tmp_path)
    tiny_anchor(request.param).save_pretrained("anchor")
    letter_tokenizer().save_pretrained("anchor")
    for seed, (name, letters) in enumerate(LETTERS.items()):
        write(tmp_path / f"{name}.txt", letters, seed)
    return tmp_path


def grafted(**options: object) -> FlexMoeForCausalLM:
    data = {"math": ["math.txt"], "code": ["code.txt"]}
    asked = {"router_data": data, "public_data": ["public.txt"], "router_tokens": 1_000, **options}
    out = flexmoe.graft("anchor", "out", {"math": "anchor", "code": "anchor"}, **asked)
    return FlexMoeForCausalLM.from_pretrained(out)


def rows(model: FlexMoeForCausalLM, name: str) -> torch.Tensor:
    return torch.cat([block.router[name].weight.detach() for block in model.flexmoe_blocks()])


@torch.no_grad()
@pytest.mark.parametrize("place", ["llama", "gpt2"], indirect=True)
@pytest.mark.parametrize("method", ["log_odds", "lda"])
def test_text_is_routed_to_the_expert_of_similar_text(place: Path, method: str) -> None:
    model, tokenizer = grafted(router=method), letter_tokenizer()
    for name in ("math", "code"):
        held_out = write(place / "held_out.txt", LETTERS[name], seed=9, length=100).read_text()
        ids = tokenizer(held_out, return_tensors="pt", add_special_tokens=False).input_ids
        for logits_TE in model(ids, output_router_logits=True).router_logits:
            chosen = logits_TE[ids[0] != tokenizer.convert_tokens_to_ids(" ")].argmax(-1)
            share = (chosen == model.expert_names.index(name)).float().mean()
            assert share > 0.7, (name, share)


def test_rows_equal_those_of_training(place: Path) -> None:
    """With all text of both sides, random choices do not matter: rows equal `fit_rows` on a graft without experts."""
    model = grafted(router_tokens=10**6, router_bias=True)
    plain = FlexMoeForCausalLM.from_pretrained(flexmoe.graft("anchor", "plain", public_data=["public.txt"]))
    tokenizer = letter_tokenizer()

    def text(document: str) -> RowText:
        ids = [*tokenizer(document, add_special_tokens=False).input_ids, 2]
        return RowText([document], torch.tensor(ids[: len(ids) // 128 * 128]).view(-1, 128))

    (public,) = read_public_sample("plain", plain.config.public_sample)
    for name in ("math", "code"):
        own = text((place / f"{name}.txt").read_text())
        expected = fit_rows(plain, row_method("log_odds"), own, text(public), tokens=10**6, bias=True, seed=0)
        torch.testing.assert_close(
            rows(model, name), torch.stack([row.weight for row in expected]), rtol=1e-3, atol=1e-4
        )
        biases = [block.router[name].bias.item() for block in model.flexmoe_blocks()]
        assert biases == pytest.approx([row.bias for row in expected], rel=1e-3, abs=1e-4)
        assert all(biases)


@pytest.mark.parametrize("family", ["llama", "gpt2", "olmo2"])
def test_states_of_dense_model_and_graft_are_equal(family: str) -> None:
    dense, model, ids = tiny_anchor(family), tiny_flexmoe(family, ["math"]), random_tokens(5, 16)
    ours, theirs = (collect_states(each, ids, [0, 1], tokens=70) for each in (dense, model))
    for layer in (0, 1):
        assert torch.equal(ours[layer], theirs[layer])


def test_the_anchor_is_loaded_at_most_once(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flexmoe.routers import text_rows

    loads, load = [], text_rows.load_dense
    monkeypatch.setattr(text_rows, "load_dense", lambda anchor: loads.append(anchor.folder) or load(anchor))
    grafted()
    assert len(loads) == 1
    first, second = (
        grafted(router="random", public_data=None, overwrite=True),
        grafted(router="random", overwrite=True),
    )
    flexmoe.graft("anchor", "plain", {"math": "anchor"})
    assert len(loads) == 1
    assert torch.equal(rows(first, "math"), rows(second, "math"))
    assert not torch.equal(rows(first, "math"), rows(first, "code")), "random rows differ between experts"


def test_a_row_depends_on_no_other_expert(place: Path) -> None:
    both = grafted()
    write(place / "code.txt", "lmnop", seed=5, length=40)  # less text means shorter sequences
    alone = grafted(overwrite=True)
    assert torch.equal(rows(both, "math"), rows(alone, "math"))
    assert not torch.equal(rows(both, "code"), rows(alone, "code"))


def test_experts_without_router_data_keep_rows_of_zero(place: Path) -> None:
    model = grafted(router_data={"code": ["code.txt"]})
    assert rows(model, "code").any()
    assert not rows(model, "math").any()


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (
            {"router_data": {"law": ["math.txt"]}},
            "Router data for law, which is not grafted; the experts are math, code",
        ),
        ({"public_data": None}, r"router='log_odds' needs public text.*--public-data FILES"),
        ({"router": "guess"}, "router='guess': no such router row method. Available: log_odds"),
        ({"router_data": {"math": ["nowhere.txt"]}}, "nowhere.txt: no such file"),
        ({"router_data": {"math": []}}, "No data files"),
        ({"text_template": "{title}"}, r"text_template\) is for the columns of tables, and there is no table"),
        ({"router_tokens": 0}, "router_tokens=0: must be above 0"),
        ({"router_data": None}, "--router, --router-bias, --router-tokens .* there is none"),
        ({"router_data": {}, "router_tokens": 40_000, "router": "lda"}, "apply to router data"),
    ],
)
def test_errors_are_raised_before_anything_is_loaded(
    place: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, object], error: str
) -> None:
    monkeypatch.setattr("flexmoe.routers.text_rows.load_dense", lambda _: pytest.fail("loaded"))
    with pytest.raises((ValueError, FileNotFoundError), match=error):
        grafted(**options)
    assert not (place / "out").exists()


def test_router_data_is_never_overwritten(place: Path) -> None:
    (place / "data").mkdir()
    text = write(place / "data" / "math.txt", "abc", seed=0)
    with pytest.raises(ValueError, match=r"math\.txt, which is read"):
        flexmoe.graft(
            "anchor", "data", {"math": "anchor"}, router_data={"math": [text]}, router="random", overwrite=True
        )
    assert text.exists()


@pytest.mark.usefixtures("place")
def test_the_command_hints_at_missing_rows(capsys: pytest.CaptureFixture[str]) -> None:
    experts = ["--expert", "math=anchor", "--expert", "code=anchor"]
    line = ["graft", "anchor", *experts, "--public-data", "public.txt", "--out", "out"]

    def output(*more: str) -> str:
        assert main([*line, "--overwrite", *more]) == 0
        return " ".join(capsys.readouterr().out.split())

    assert "All router rows are zero" in output()
    assert "without router data, whose rows are zero: code." in output("--router-data", "math=math.txt", "public.txt")
    assert "zero" not in output("--router-data", "math=math.txt", "code=code.txt")
    assert main([*line, "--overwrite", "--router-data", "=x"]) == 1
    assert "--router-data =x: write name=file" in capsys.readouterr().err
