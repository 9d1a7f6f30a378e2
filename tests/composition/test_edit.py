"""Editing compositions: they load as the model that `compose` writes, merge, and move their pins."""

import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from flexmoe.composition.edit import Move, compose_by_reference, update_composition
from flexmoe.conversion.compose import compose
from flexmoe.conversion.graft import graft
from flexmoe.modeling import FlexMoeForCausalLM
from flexmoe.testing import perturb_expert, random_tokens, realigned, tiny_anchor
from flexmoe.tokenization import TokenizerError
from tests.support.hub import HubServer, point_client_at
from tests.support.soak import soak

OWNERS = ("math", "code", "law")
_numbers = itertools.count()


def save_package(grafted: Path, out: Path, name: str, *, seed: int = 0, bias: bool = False, **fields: str) -> Path:
    model = FlexMoeForCausalLM.from_pretrained(grafted)
    model.add_expert_copy(name)
    perturb_expert(model, name, seed)
    if not bias:
        for block in model.flexmoe_blocks():
            torch.nn.init.zeros_(block.router[name].bias)
    return model.save_expert(name, out, **fields)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An anchor, its graft, a package of each owner, and one with biases."""
    folder = tmp_path_factory.mktemp("stored")
    tiny_anchor("llama").save_pretrained(folder / "anchor")
    graft(folder / "anchor", folder / "grafted")
    for name in OWNERS:
        save_package(folder / "grafted", folder / name, name, license="apache-2.0")
    save_package(folder / "grafted", folder / "biased", "biased", bias=True)
    return folder


@pytest.fixture
def world(stored: Path, tmp_path: Path) -> Path:
    """A copy that may be changed."""
    return shutil.copytree(stored, tmp_path / "world")


def loaded(folder: Path) -> FlexMoeForCausalLM:
    return FlexMoeForCausalLM.from_pretrained(folder)


def assert_same(one: FlexMoeForCausalLM, other: FlexMoeForCausalLM) -> None:
    first, second = one.state_dict(), other.state_dict()
    assert list(first) == list(second)
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    ignored = {"_name_or_path": None}
    assert {**one.config.to_dict(), **ignored} == {**other.config.to_dict(), **ignored}
    with torch.no_grad():
        outputs = [realigned(model)(random_tokens(2, 9))[0] for model in (one, other)]
    assert torch.equal(*outputs)


def by_reference(world: Path, out: str, *names: str, **options: object) -> Path:
    packages = [world / name for name in names]
    return compose_by_reference(world / "grafted", packages, world / out, anchor=world / "anchor", **options)


class TestComposing:
    @pytest.mark.parametrize(
        "options",
        [soak({}), {"public_prior": 0.75}, soak({"num_experts_per_tok": 2}), {"names": {"math": "algebra"}}],
    )
    def test_equals_the_merged_model(self, world: Path, options: dict[str, object]) -> None:
        composition = by_reference(world, "composition", "math", "code", **options)
        merged = compose(world / "grafted", [world / "math", world / "code"], world / "merged", **options)
        assert_same(loaded(composition), loaded(merged))
        assert sum(f.stat().st_size for f in composition.iterdir() if f.suffix != ".py") < 20_000

    def test_equals_save_composition_byte_for_byte(self, world: Path) -> None:
        composition = by_reference(world, "composition", "math", "code")
        sources = {"public": world / "anchor", "math": world / "math", "code": world / "code"}
        merged = compose(world / "grafted", [world / "math", world / "code"], world / "merged")
        saved = loaded(merged).save_composition(world / "saved", sources=sources)
        assert {f.name: f.read_bytes() for f in composition.iterdir()} == {
            f.name: f.read_bytes() for f in saved.iterdir()
        }

    def test_default_prior_of_rows_with_biases(self, world: Path) -> None:
        model = loaded(by_reference(world, "composition", "biased"))
        assert {block.router["public"].bias.item() for block in model.flexmoe_blocks()} == {0.5}
        with pytest.raises(ValueError, match="pass --public-prior"):
            by_reference(world, "other", "biased", "math")

    def test_errors(self, world: Path, tmp_path: Path) -> None:
        merged = compose(world / "grafted", [world / "math"], world / "merged")
        cases: list[tuple[type[Exception], str, Callable[[], object]]] = [
            (ValueError, "give at least one", lambda: by_reference(world, "out")),
            (TypeError, "expected a list",
             lambda: compose_by_reference(world / "grafted", world / "math", world / "out")),
            (ValueError, "location of this graft's dense anchor is not recorded",
             lambda: compose_by_reference(world / "grafted", [world / "math"], world / "out")),
            (ValueError, "is not the anchor of this model",
             lambda: compose_by_reference(world / "grafted", [world / "math"], world / "out", anchor=tmp_path / "b")),
            (ValueError, "in its weights", lambda: compose_by_reference(merged, [world / "code"], world / "out")),
            (ValueError, "already", lambda: by_reference(world, "out", "math", "math")),
            (ValueError, "no package 'x' to rename", lambda: by_reference(world, "out", "math", names={"x": "y"})),
            (ValueError, "must be a finite number", lambda: by_reference(world, "out", "math", public_prior=1e999)),
            (ValueError, "which is read", lambda: by_reference(world, "math", "math", overwrite=True)),
        ]  # fmt: skip
        tiny_anchor("llama", seed=1).save_pretrained(tmp_path / "b")
        before = sorted(world.rglob("*"))
        for kind, words, action in cases:
            with pytest.raises(kind, match=words):
                action()
        assert sorted(world.rglob("*")) == before

    def test_an_anchor_without_recorded_commit_is_pinned_to_the_current_one(
        self, world: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with HubServer().running() as server:
            point_client_at(server.url, monkeypatch)
            monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(world / "cache"))
            repo = f"lab{next(_numbers)}/anchor"
            commit = server.push_folder(repo, world / "anchor")
            config = json.loads((world / "grafted" / "config.json").read_text())
            config["anchor"] |= {"repo": repo, "revision": None}
            (world / "grafted" / "config.json").write_text(json.dumps(config))
            out = compose_by_reference(world / "grafted", [world / "math"], world / "out")
            named = json.loads((out / "config.json").read_text())["composition"]["anchor"]
            assert named == {"repo": repo, "revision": commit}
            assert loaded(out).expert_names == ["public", "math"]

    def test_a_damaged_package_is_refused(self, world: Path) -> None:
        file = world / "math" / "expert.safetensors"
        file.write_bytes(file.read_bytes()[:-1] + b"\1")
        with pytest.raises(ValueError, match="SHA-256"):
            by_reference(world, "out", "math")
        assert not (world / "out").exists()


class TestFilesBesideTheConfig:
    """Generation settings come along; of a composition also what its author put beside it, and nothing else."""

    @pytest.mark.promise(
        "`compose --update`",
        "a composition with a tokenizer, terms and other files",
        "the first two are kept, the others named in a warning",
    )
    def test_a_tokenizer_and_terms_of_a_composition_are_kept(self, world: Path) -> None:
        base = by_reference(world, "base", "math")
        (base / "LICENSE").write_text("Terms.")
        (base / "tokenizer_config.json").write_text('{"model_max_length": 8}')
        (base / "notes.txt").write_text("Private.")
        with pytest.warns(UserWarning, match=r"Not copied from .*: notes\.txt"):
            update_composition(base, world / "newer")
        copied = {path.name for path in (world / "newer").iterdir()}
        assert {"LICENSE", "tokenizer_config.json"} <= copied
        assert "notes.txt" not in copied
        with pytest.raises(ValueError, match=r"would delete notes\.txt"):
            update_composition(base, base, overwrite=True)
        assert (base / "notes.txt").exists()

    @pytest.mark.parametrize("base", ["grafted", "composition"])
    def test_links_out_of_the_folder(self, world: Path, base: str) -> None:
        if base == "composition":
            by_reference(world, base, "code")
        (world / "secret").write_text('{"top_p": 0.5}')
        (world / base / "generation_config.json").unlink(missing_ok=True)
        (world / base / "generation_config.json").symlink_to(world / "secret")
        with pytest.raises(ValueError, match="leads out of the folder"):
            compose_by_reference(world / base, [world / "math"], world / "out", anchor=world / "anchor")
        assert not (world / "out").exists()

    @pytest.mark.promise(
        "`compose --by-reference`", "a base whose JSON files name code of others", "left out with a warning"
    )
    @pytest.mark.parametrize("base", ["grafted", "composition"])
    def test_code_of_others_is_left_out(self, world: Path, base: str) -> None:
        evil = "evil/repo--x.Evil"
        if base == "composition":
            by_reference(world, base, "code")
        for file in ("config.json", "generation_config.json"):
            values = json.loads((world / base / file).read_text())
            (world / base / file).write_text(json.dumps(values | {"auto_map": {"AutoModel": evil}}))
        with pytest.warns(UserWarning, match=evil):
            out = compose_by_reference(world / base, [world / "math"], world / "out", anchor=world / "anchor")
        assert not [path.name for path in out.iterdir() if evil.encode() in path.read_bytes()]


@pytest.mark.parametrize("way", ["by reference", "update"])
def test_a_tokenizer_that_reads_other_tokens_than_the_anchors(
    world: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = by_reference(world, "base", "math")
    monkeypatch.setattr("flexmoe.tokenization.differs_from_anchor", lambda *_: "other tokens")
    ways = {
        "by reference": lambda: by_reference(world, "out", "code"),
        "update": lambda: update_composition(base, world / "out"),
    }
    with pytest.raises(TokenizerError, match="other tokens"):
        ways[way]()
    assert not (world / "out").exists()


class TestMerging:
    def test_two_over_one_anchor(self, world: Path) -> None:
        one, two = by_reference(world, "one", "math"), by_reference(world, "two", "code", "law")
        merged = compose_by_reference(one, [two], world / "both")
        assert_same(loaded(merged), loaded(by_reference(world, "all", "math", "code", "law")))

    def test_with_packages_in_the_order_given(self, world: Path) -> None:
        one, two = by_reference(world, "one", "math"), by_reference(world, "two", "law")
        merged = compose_by_reference(one, [world / "code", two], world / "all")
        assert loaded(merged).expert_names == ["public", "math", "code", "law"]

    def test_keeps_changed_rows_and_active_experts(self, world: Path) -> None:
        model = loaded(by_reference(world, "first", "code"))
        model.flexmoe_blocks()[0].router["code"].weight.data += 0.25
        model.set_active_experts(["public"])
        sources = {"public": world / "anchor", "code": world / "code"}
        tuned = model.save_composition(world / "tuned", sources=sources)
        merged = loaded(compose_by_reference(by_reference(world, "one", "math"), [tuned], world / "both"))
        rows = [m.flexmoe_blocks()[0].router["code"].weight for m in (merged, model)]
        assert torch.equal(*rows)
        assert merged.active_experts == ["public", "math"]

    def test_equal_experts_are_added_once_and_others_need_a_name(self, world: Path) -> None:
        one = by_reference(world, "one", "math", "code")
        same = by_reference(world, "same", "code", "law")
        assert loaded(compose_by_reference(one, [same], world / "all")).expert_names == ["public", *OWNERS]
        save_package(world / "grafted", world / "code-b", "code", seed=1)
        other = by_reference(world, "other", "code-b")
        with pytest.raises(ValueError, match="has an expert 'code', and so has the base"):
            compose_by_reference(one, [other], world / "out")
        renamed = compose_by_reference(one, [other], world / "out", names={"code": "code-b"})
        assert loaded(renamed).expert_names == ["public", "math", "code", "code-b"]

    @pytest.mark.parametrize(
        ("options", "words", "remedy"),
        [
            ({"public_prior": 1.0}, "--public-prior", {"public_prior": 1.0}),
            ({"num_experts_per_tok": 3}, "--num-experts-per-tok", {"num_experts_per_tok": 3}),
        ],
    )
    def test_differing_settings_must_be_chosen(
        self, world: Path, options: dict[str, float], words: str, remedy: dict[str, float]
    ) -> None:
        one, two = by_reference(world, "one", "math"), by_reference(world, "two", "code", **options)
        with pytest.raises(ValueError, match=words):
            compose_by_reference(one, [two], world / "out")
        merged = compose_by_reference(one, [two], world / "out", **remedy)
        assert_same(loaded(merged), loaded(by_reference(world, "all", "math", "code", **options)))

    def test_different_anchors_are_refused(self, world: Path, tmp_path: Path) -> None:
        tiny_anchor("llama", seed=1).save_pretrained(tmp_path / "anchor")
        grafted = graft(tmp_path / "anchor", tmp_path / "grafted")
        package = save_package(grafted, tmp_path / "math", "math")
        other = compose_by_reference(grafted, [package], tmp_path / "other", anchor=tmp_path / "anchor")
        with pytest.raises(ValueError, match="the anchor's fingerprint is"):
            compose_by_reference(by_reference(world, "one", "code"), [other], world / "out")


class TestUpdating:
    @pytest.fixture
    def hub(self, world: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
        """A composition whose parts are on a Hub, and the means to publish a newer version of one."""
        with HubServer().running() as server:
            point_client_at(server.url, monkeypatch)
            monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(world / "cache"))
            lab = f"lab{next(_numbers)}"
            for name in ("anchor", *OWNERS):
                server.push_folder(f"{lab}/{name}", world / name)
            grafted = graft(f"{lab}/anchor", world / "of-the-hub")
            composition = compose_by_reference(grafted, [f"{lab}/math", f"{lab}/code"], world / "pinned")

            def publish(name: str, seed: int, version: str) -> str:
                folder = world / f"{name}-{version}"
                save_package(world / "grafted", folder, name, seed=seed, version=version)
                return server.push_folder(f"{lab}/{name}", folder)

            yield SimpleNamespace(server=server, lab=lab, grafted=grafted, composition=composition, publish=publish)

    def test_to_the_newest(self, hub: SimpleNamespace, world: Path) -> None:
        old = hub.server.repositories[f"{hub.lab}/math"].refs["main"]
        new = hub.publish("math", 1, "2.0.0")
        before = loaded(hub.composition)
        moves = update_composition(hub.composition, world / "updated")
        assert moves == [Move("math", old, new, "1.0.0", "2.0.0")]
        fresh = compose_by_reference(hub.grafted, [f"{hub.lab}/math", f"{hub.lab}/code"], world / "fresh")
        assert_same(loaded(world / "updated"), loaded(fresh))
        assert_same(loaded(hub.composition), before)  # pinned is pinned
        assert update_composition(world / "updated", world / "updated", overwrite=True) == []

    def test_one_expert_to_a_revision(self, hub: SimpleNamespace, world: Path) -> None:
        second = hub.publish("math", 1, "2.0.0")
        hub.publish("math", 2, "3.0.0")
        hub.publish("code", 1, "2.0.0")
        (move,) = update_composition(hub.composition, world / "updated", experts={"math": second})
        assert (move.name, move.new_revision, move.new_version) == ("math", second, "2.0.0")
        config = json.loads((world / "updated" / "config.json").read_text())
        assert [record.get("version") for record in config["experts"]] == [None, "2.0.0", "1.0.0"]

    def test_rows_changed_for_the_old_version_are_dropped(self, hub: SimpleNamespace, world: Path) -> None:
        model = loaded(hub.composition)
        for name in ("math", "code"):
            model.flexmoe_blocks()[1].router[name].weight.data += 0.25
        tuned = model.save_composition(world / "tuned")
        hub.publish("math", 1, "2.0.0")
        with pytest.warns(UserWarning, match="rows of 'math' that were changed"):
            update_composition(tuned, world / "updated")
        updated = loaded(world / "updated").flexmoe_blocks()[1].router
        newest = loaded(world / "updated")
        newest.replace_expert("math", f"{hub.lab}/math")
        assert torch.equal(updated["math"].weight, newest.flexmoe_blocks()[1].router["math"].weight)
        assert torch.equal(updated["code"].weight, model.flexmoe_blocks()[1].router["code"].weight)

    def test_folders(self, world: Path) -> None:
        composition = by_reference(world, "composition", "math", "code")
        save_package(world / "grafted", world / "newer", "math", seed=1, version="2")
        shutil.rmtree(world / "math")
        shutil.move(world / "newer", world / "math")
        with pytest.raises(ValueError, match="not the one that the composition was"):
            loaded(composition)
        (move,) = update_composition(composition, composition, overwrite=True)
        assert (move.old_version, move.new_version) == ("1.0.0", "2")
        assert_same(loaded(composition), loaded(by_reference(world, "anew", "math", "code")))

    def test_errors(self, hub: SimpleNamespace, world: Path) -> None:
        with pytest.raises(ValueError, match="no expert 'law'; it has math, code"):
            update_composition(hub.composition, world / "out", experts={"law": None})
        with pytest.raises(ValueError, match="is not a composition"):
            update_composition(world / "grafted", world / "out")
        with pytest.raises(FileNotFoundError, match="no revision 'v9'"):
            update_composition(hub.composition, world / "out", experts={"math": "v9"})
        del hub.server.repositories[f"{hub.lab}/math"]
        with pytest.raises(FileNotFoundError, match=f"{hub.lab}/math"):
            update_composition(hub.composition, world / "out")
        assert not (world / "out").exists()
