"""Rendered cards: their contents, their front matter for the Hub, and that untrusted text stays text."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
from huggingface_hub import EvalResult, ModelCard
from markdown_it import MarkdownIt

from flexmoe import FlexMoeConfig
from flexmoe.cards.facts import composition_facts, expert_facts, model_facts
from flexmoe.cards.licenses import license_conflicts
from flexmoe.cards.markdown import one_line
from flexmoe.cards.rendering import MIXED, render
from flexmoe.packages.manifest import ExpertManifest
from tests.support.hub import HubServer, point_client_at

HOSTILE = (
    "plain",
    "a | b | c",
    "one\n---\nlicense: mit\n---\n# Title",
    "---\nbase_model: evil/model",
    "</td><script>alert(1)</script><img src=x>",
    "![x](http://tracker/x.png) [click](javascript:x) `code` \\| **bold** ~~gone~~",
    "# heading\r\n- list\n1. list\n> quote\n| a |\n|---|\n=====\n```\nfence",
    "ünïcode 日本語 👀 \u2028\u0085\x1b[31m \u202egnp.exe",
    "{{ 7 * 7 }} {% raw %} {# x #}",
    "long " * 200,
    "trailing backslash \\",
    "one\n\n    indented\n\n\n[x]: http://y\n\n> \n\n+ two",
    "__bold__ _em_ ___both___ a __b__ *_c_*",
    "https://evil.example/x?y=z_z_ or WWW.evil.example, mailto:a@b.example (jane@b.example) and @jane",
    "&#x202e;gnp.exe &lt;b&gt; &commat;jane https&#58;//evil.example $$x_{1}$$",
    "\u200bz\u200de\u2060r\ufeffo\u200e w\u00adi\u061cd\u2066t\U000e0041h",
    "@`@`a@b`|a@b|`|c@d\\`\\https://x\\|`",
)
# Invisible characters and those that change the direction of text; a list independent of the implementation's.
INVISIBLE = [
    *range(0x200B, 0x2010),
    *range(0x202A, 0x202F),
    *range(0x2060, 0x2070),
    0xAD,
    0x61C,
    0xFEFF,
    0xE0041,
    0x9B,
]
SCORES = {
    "prose": {"loss": 1.23456, "perplexity": 3.4369, "tokens": 1000, "documents": 3},
    "a | b\n---": {"loss": 2.0, "perplexity": None, "tokens": 5, "documents": 1},
}


def manifest(**changes: Any) -> ExpertManifest:
    values = {
        "name": "math",
        "layers": [0, 1],
        "ffn": {"class": "LlamaMLP", "hidden": 4, "intermediate": [8, 16]},
        "dtype": "bfloat16",
        "anchor": {"repo": "owner/anchor", "revision": "abc", "fingerprint": "0" * 64, "model_type": "llama"},
        "training": {"tokens": 1000, "k": 2, "seed": 7, "config": {"learning_rate": 0.002}},
        "license": "apache-2.0",
        "data_statement": "Worked problems.",
    }
    return ExpertManifest(**{**values, **changes})


def config(*experts: dict[str, Any], **changes: Any) -> FlexMoeConfig:
    anchor = {"repo": "owner/anchor", "revision": "abc", "fingerprint": "0" * 64, "model_type": "olmo2"}
    return FlexMoeConfig(experts=["public", *experts], **{"anchor": anchor, **changes})


def record(name: str, license: str | None = "mit", **more: Any) -> dict[str, Any]:
    return {"name": name, "license": license, "source": {"repo": f"{name}-org/{name}", "revision": "1" * 40}, **more}


def sources(*names: str) -> dict[str, dict[str, str]]:
    return {
        "public": {"repo": "owner/anchor", "revision": "abc"},
        **{name: {"folder": f"../{name}"} for name in names},
    }


def hostile_facts(text: str) -> dict[str, dict[str, Any]]:
    """Facts of each kind, with `text` wherever a file may hold untrusted text."""
    anchor = {"repo": text, "revision": text, "fingerprint": text, "model_type": text}
    values = {"license": text, "data_statement": text, "version": text, "source": {"repo": text, "revision": text}}
    ours = config({"name": "math", **values}, {"name": "code", **values}, anchor=anchor)
    training = {text: text, "config": {text: [text, {text: text}]}}
    expert = expert_facts(
        manifest(**{k: values[k] for k in ("license", "data_statement")}, version=text[:64], training=training)
    )
    expert |= {"anchor": anchor, "dtype": text, "ffn": {"class": text, "hidden": 4, "intermediate": 8}}
    by_reference = {"public": {"folder": text}, "math": {"folder": text}, "code": {"repo": text, "revision": text}}
    return {
        "expert": expert,
        "model": model_facts(ours),
        "composition": composition_facts(ours, by_reference),
    }


def rendered(kind: str, facts: dict[str, Any]) -> str:
    """The card with everything that it can have."""
    if kind == "expert":
        return render(kind, facts, evaluation=SCORES)
    usage = {"tokens": 10, "share": {"public": 0.25, "math": 0.75}, "chosen_share": {"public": 0.5, "math": 0.5}}
    return render(kind, facts, evaluation=SCORES, routing={"a | b": usage}, license=facts["experts"][0]["license"])


def shape(text: str) -> list[tuple[str, str]]:
    """The structure of a card's body: the type and tag of each Markdown token, except for plain text."""
    tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(ModelCard(text).text)
    nested = [inner for token in tokens for inner in (token, *(token.children or []))]
    # the quoted statement may have several lines and paragraphs, and addresses become code
    plain = {"text", "softbreak", "text_special", "inline", "paragraph_open", "paragraph_close", "code_inline"}
    return [(token.type, token.tag) for token in nested if token.type not in plain]


@pytest.mark.parametrize("kind", ["expert", "composition", "model"])
@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_untrusted_text_is_only_text(kind: str, text: str) -> None:
    written = rendered(kind, hostile_facts(text)[kind])
    harmless = rendered(kind, hostile_facts("word")[kind])
    assert shape(written) == shape(harmless)
    kinds = {token for token, _ in shape(written)}
    assert not kinds & {"html_inline", "html_block", "image", "link_open", "s_open"}
    assert not set("\x1b\u2028").intersection(written)
    assert not set(map(chr, INVISIBLE)).intersection(written)
    assert not re.search(r"://|www\.|@", prose(written), re.IGNORECASE)
    assert not set(map(chr, INVISIBLE)).intersection(prose(written))  # nor as entities
    assert headings(written) == headings(harmless)
    data = ModelCard(written).data.to_dict()
    fixed = {"license", "license_name", "base_model", "base_model_relation", "model-index"}
    assert data.keys() - fixed == ModelCard(harmless).data.to_dict().keys() - fixed
    bases = data.get("base_model")
    assert bases == "owner/anchor" if kind == "expert" else bases in (None, text)


def headings(text: str) -> list[str]:
    tokens = MarkdownIt("commonmark").parse(ModelCard(text).text)
    return [tokens[i + 1].content for i, token in enumerate(tokens) if token.type == "heading_open"]


def prose(text: str) -> str:
    """The visible text of a card's body except code: GitHub's Markdown links addresses in it."""
    tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(ModelCard(text).text)
    inner = [child for token in tokens for child in token.children or ()]
    return "".join(" " if child.type == "code_inline" else child.content for child in inner)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("__init__ _em_ snake_case x__y", r"\_\_init\_\_ \_em\_ snake_case x\_\_y"),
        ("Ask jane_d@x.example.", "Ask `jane_d@x.example`."),
        ("(https://x.example/a_b?c=d), or www.x.example!", "(`https://x.example/a_b?c=d`), or `www.x.example`!"),
        ("thanks @jane", "thanks `@jane`"),
        ("[a](http://b|c)", r"\[`a](http://b`\|c)"),
        ("`http://b`", r"\``http://b`\`"),
        ("R&D & &copy; &#64;", "R&amp;D & &amp;copy; &amp;#64;"),
        ("$5 <b> a\\b", r"\$5 &lt;b> a\\b"),
        ("a\u200bb\tc\r\nd", "ab c d"),
        (None, ""),
    ],
)
def test_a_line_is_escaped_and_legible(text: str | None, line: str) -> None:
    assert one_line(text) == line


def test_escaping_a_line_takes_linear_time() -> None:
    assert len(one_line("a_" * 500_000 + "@" * 500_000)) == 1_500_002


CARDS: dict[str, tuple[str, Any]] = {
    "expert": ("expert", expert_facts(manifest())),
    "low-rank": ("expert", expert_facts(manifest(kind="low_rank", rank=[4, 8], alpha=8))),
    "no optional facts": ("expert", expert_facts(manifest(license=None, data_statement=None, training=None))),
    "unknown anchor": (
        "expert",
        expert_facts(manifest(anchor=dict.fromkeys(("repo", "revision", "fingerprint")) | {"model_type": "x"})),
    ),
    "own licence": ("expert", expert_facts(manifest(license="Our terms: ask!"))),
    "graft": ("model", model_facts(config())),
    "plain model": ("model", model_facts(config({"name": "math"}, anchor=None))),
    "model": ("model", model_facts(config(record("math"), record("code", "cc-by-nc-4.0"), active_experts=["public"]))),
    "composition": ("composition", composition_facts(config(record("math"), record("code")), sources("math", "code"))),
}


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    with HubServer().running() as server:
        yield server


@pytest.mark.parametrize("name", CARDS)
def test_the_hub_accepts_every_card(name: str, hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, facts = CARDS[name]
    has_experts = kind == "expert" or facts["experts"]
    text = rendered(kind, facts) if has_experts else render(kind, facts, evaluation=SCORES)
    assert text.endswith("\n")
    assert not text.endswith("\n\n")
    assert "None" not in text
    read = ModelCard(text)
    assert ModelCard(str(read)).data.to_dict() == read.data.to_dict()
    point_client_at(hub.url, monkeypatch)
    read.validate()


def test_an_experts_card() -> None:
    text = render("expert", expert_facts(manifest(kind="low_rank", rank=[4, 8])))
    data = ModelCard(text).data.to_dict()
    assert data == {
        "base_model": "owner/anchor",
        "base_model_relation": "adapter",
        "library_name": "flexmoe",
        "license": "apache-2.0",
        "tags": ["flexmoe", "flexmoe-expert"],
    }
    for line in (
        "| kind | low-rank, 4 to 8 |",
        f"| anchor's fingerprint | `{'0' * 64}` |",
        "| networks | LlamaMLP, hidden size 4, intermediate size 8 to 16, bfloat16 |",
        "> Worked problems.",
        "| tokens | 1000 |",
        "| config.learning_rate | 0.002 |",
        'model.remove_expert("math")  # and the model is again the one that never had it',
    ):
        assert line in text.splitlines()


def test_a_card_says_what_a_table_of_scores_tells() -> None:
    evidence = {"tokens": 99, "decays": [0.9], "window": 64}
    told = "which tokens of the vocabulary are more, or less,"
    assert told in render("expert", expert_facts(manifest(evidence=evidence)))
    assert told not in render("expert", expert_facts(manifest()))


def test_a_models_card_lists_experts_and_licence_conflicts() -> None:
    facts = model_facts(config(record("math", data_statement="A | B"), record("code", "cc-by-nc-4.0", kind="full")))
    text = render("model", facts, license="apache-2.0")
    row = f"| `math` | math-org | math-org/math | `{'1' * 40}` |  | full | mit | A \\| B |"
    assert row in text.splitlines()
    (conflict,) = license_conflicts({"math": "mit", "code": "cc-by-nc-4.0"}, "apache-2.0")
    assert f"- {conflict}" in text.splitlines()
    assert "These licences conflict" not in render("model", facts, license="cc-by-nc-4.0")
    data = ModelCard(text).data
    assert data.base_model == ["owner/anchor", "math-org/math", "code-org/code"]
    assert (data.license, data["base_model_relation"]) == ("apache-2.0", "merge")


@pytest.mark.parametrize(
    ("anchor", "experts", "license"),
    [
        (None, ["mit", "mit"], MIXED),  # the anchor's licence applies too, and is unknown
        ("apache-2.0", ["mit", "mit"], "apache-2.0"),
        ("apache-2.0", ["mit", "cc-by-nc-4.0"], "cc-by-nc-4.0"),
        ("apache-2.0", ["mit", None], MIXED),
        ("apache-2.0", ["gpl-3.0", "cc-by-nc-4.0"], MIXED),
        ("apache-2.0", ["cc-by-nd-4.0"], MIXED),
    ],
)
def test_the_licence_of_a_model_without_a_given_one(
    anchor: str | None, experts: list[str | None], license: str
) -> None:
    facts = model_facts(config(*(record(f"e{i}", name) for i, name in enumerate(experts))))
    facts["anchor"]["license"] = anchor
    data = ModelCard(render("model", facts)).data
    assert (data.get("license_name") or data.license) == license


def test_scores_are_read_back_by_the_hub_client() -> None:
    data = ModelCard(render("model", CARDS["model"][1], evaluation=SCORES, name="mine")).data
    assert data.model_name == "mine"
    common = {"task_type": "text-generation", "dataset_type": "text"}
    loss, perplexity = {"metric_type": "loss"}, {"metric_type": "perplexity"}
    assert [
        {key: value for key, value in vars(result).items() if key in (*common, *loss, "metric_value", "dataset_name")}
        for result in data.eval_results
    ] == [
        {**common, **loss, "dataset_name": "prose", "metric_value": 1.2346},
        {**common, **perplexity, "dataset_name": "prose", "metric_value": 3.4369},
        {**common, **loss, "dataset_name": "a | b ---", "metric_value": 2.0},
    ]
    assert all(isinstance(result, EvalResult) for result in data.eval_results)


def test_routing_statistics_have_a_column_for_each_text() -> None:
    usage = {"tokens": 12, "share": {"public": 0.25, "math": 0.75}, "chosen_share": {"public": 0.5, "math": 0.5}}
    text = render("model", model_facts(config({"name": "math"})), routing={"prose": usage, "x|y": usage})
    rows = text[text.index("## Routing") :].splitlines()[4:9]
    assert rows == [
        "| expert | prose | x\\|y |",
        "|---|---|---|",
        "| `public` | 25.0% (50.0%) | 25.0% (50.0%) |",
        "| `math` | 75.0% (50.0%) | 75.0% (50.0%) |",
        "| tokens | 12 | 12 |",
    ]


def test_a_compositions_card_describes_withdrawal() -> None:
    text = render(*CARDS["composition"])
    assert "withdraws the expert from every later load" in text
    assert "../math" in text
    assert ModelCard(text).data.tags == ["flexmoe", "flexmoe-composition"]


def test_there_are_three_kinds() -> None:
    with pytest.raises(ValueError, match="no card of a 'dataset'"):
        render("dataset", {})


def test_tables_have_equally_many_columns_in_each_row() -> None:
    for kind, facts in CARDS.values():
        for block in re.findall(r"(?:^\|.*\n)+", render(kind, facts, evaluation=SCORES), re.MULTILINE):
            widths = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
            assert len(widths) == 1, block
