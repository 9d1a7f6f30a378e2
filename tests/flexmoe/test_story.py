"""The whole story: owners push, a user composes by reference and generates, an owner withdraws.

What is left then is, bit for bit, the model that never knew that owner.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import HfApi
from transformers import AutoModelForCausalLM, AutoTokenizer

from flexmoe.conversion.graft import graft
from flexmoe.modeling import FlexMoeForCausalLM
from flexmoe.testing import perturb_expert, realigned, tiny_anchor
from flexmoe_cli import main
from tests.support.hub import HubServer, point_client_at
from tests.support.letters import letter_tokenizer

OWNERS = ("hospital", "publisher")


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    with HubServer().running() as hub:
        hub.tokens |= {f"of-{name}": name for name in ("lab", "user", *OWNERS)}
        point_client_at(hub.url, monkeypatch, token="of-user")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        yield SimpleNamespace(hub=hub, folder=tmp_path)


def publish(world: SimpleNamespace, grafted: Path, owner: str) -> None:
    """An owner makes an expert (here of noise) and pushes it, with the account of its own."""
    model = FlexMoeForCausalLM.from_pretrained(grafted)
    model.add_expert_copy(owner)
    perturb_expert(model, owner)
    for block in model.flexmoe_blocks():
        torch.nn.init.zeros_(block.router[owner].bias)
    fields = {"license": "cc-by-4.0", "data_statement": f"Letters of the {owner}."}
    model.push_expert_to_hub(owner, f"{owner}/expert", token=f"of-{owner}", **fields)


def outcome(
    model: FlexMoeForCausalLM, tokens: dict[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    with torch.no_grad():
        return model.state_dict(), realigned(model)(**tokens).logits


def test_owners_push_a_user_composes_one_withdraws(
    world: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(world.folder)
    # the lab publishes an anchor, once
    tiny_anchor("llama").save_pretrained("anchor")
    letter_tokenizer().save_pretrained("anchor")
    world.hub.push_folder("lab/anchor", Path("anchor"))
    # each owner grafts it, makes an expert where its text is, and pushes nothing but the package
    for owner in OWNERS:
        publish(world, graft("lab/anchor", Path(f"grafted-{owner}")), owner)
    # a user, who has never seen the owners' machines, names the parts, pushes kilobytes, and generates
    graft("lab/anchor", Path("grafted"))
    capsys.readouterr()
    experts = [f"{owner}/expert" for owner in OWNERS]
    assert main(["compose", "grafted", *experts, "--by-reference", "--out", "model", "--json"]) == 0
    composed = json.loads(capsys.readouterr().out)
    assert [expert["name"] for expert in composed["experts"]] == ["public", *OWNERS]
    assert main(["push", "model", "user/model"]) == 0
    model = AutoModelForCausalLM.from_pretrained("user/model")
    tokens = AutoTokenizer.from_pretrained("anchor")("words of a patient", return_tensors="pt")
    tokens.pop("token_type_ids", None)
    assert model.generate(**tokens, max_new_tokens=5, experts=["public", "hospital"]).shape[1] == 18 + 5
    # the hospital takes its repository away: the next load says so, the cache notwithstanding
    HfApi().delete_repo("hospital/expert", token="of-hospital")
    with pytest.raises(FileNotFoundError, match=r"user/model lacks 1 of its experts\. 'hospital': 'hospital/expert'"):
        AutoModelForCausalLM.from_pretrained("user/model")
    with pytest.warns(UserWarning, match="Loaded without 'hospital'"):
        left = AutoModelForCausalLM.from_pretrained("user/model", missing_experts="skip")
    # what is left is, bit for bit, the model of somebody who never had the hospital, made by another process
    command = [sys.executable, "-m", "flexmoe", "compose", "grafted", "publisher/expert", "--by-reference"]
    environment = world.hub.environment(world.folder / "another-home", token="of-user")
    done = subprocess.run([*command, "--out", "without"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    never = AutoModelForCausalLM.from_pretrained("without")
    assert left.expert_names == never.expert_names == ["public", "publisher"]
    (state, logits), (other_state, other_logits) = outcome(left, tokens), outcome(never, tokens)
    assert list(state) == list(other_state)
    assert all(torch.equal(tensor, other_state[name]) for name, tensor in state.items())
    assert torch.equal(logits, other_logits)
    ignored = {"_name_or_path": None}
    assert {**left.config.to_dict(), **ignored} == {**never.config.to_dict(), **ignored}
    # and whoever was grafted, trained and pushed apart left no path, and no text, on the Hub
    for repository in world.hub.repositories.values():
        sent = b"".join(file.body for commit in repository.commits.values() for file in commit.files.values())
        assert str(world.folder).encode() not in sent
