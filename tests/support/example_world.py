"""The folders and the Hub that the examples of docstrings use: a tiny anchor, packages, a model, texts.

    anchor/  math-tuned/      dense checkpoints, the second a fine-tune of the first
    grafted/                  the anchor, grafted, with a sample of public text
    math-expert/  code-expert/  law-expert/     expert packages for it
    math-small/               a low-rank expert package
    model/                    the model of public, math and code
    composition/              the same with the expert of the Hub, by reference
    flex-olmo/                a FlexOlmo checkpoint of transformers
    keys/                     hospital.pem and hospital.pub
    public.txt  problems.txt  text
    path/to/model             the same as model/
    hospital/derm-expert      an expert package on the Hub; the client is logged in as "hospital"
    org/math-expert           another one, of somebody else

Does not cover running the examples (`tests/test_docstring_examples.py`).
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, FlexOlmoConfig, FlexOlmoForCausalLM

import flexmoe
from flexmoe.testing import perturb_expert, tiny_anchor
from tests.support.hub import HubServer, point_client_at
from tests.support.letters import letter_tokenizer

END = "\n<|endofdocument|>\n"
TOKENS = {"secret": "hospital", "another": "org"}
HUB_EXPERTS = {"hospital/derm-expert": "derm-expert", "org/math-expert": "law-expert"}


def build_world(folder: Path) -> Path:
    """Fills `folder` with everything that needs no Hub."""
    anchor, tuned = tiny_anchor("llama"), tiny_anchor("llama")
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if ".mlp." in name:
                parameter.mul_(1.1)
    for model, name in ((anchor, "anchor"), (tuned, "math-tuned")):
        model.save_pretrained(folder / name)
        letter_tokenizer().save_pretrained(folder / name)
    for file, text in (
        ("public.txt", "on the day of {} the river rose and the rain fell."),
        ("problems.txt", "what is {} and one? it is {} {}."),
    ):
        (folder / file).write_text(END.join(text.format(word, word, word) for word in _words(60)))
    grafted = flexmoe.graft(folder / "anchor", folder / "grafted", public_data=[folder / "public.txt"])
    for name in ("math", "code", "law", "derm"):
        _package(grafted, name, folder / f"{name}-expert")
    _package(grafted, "math", folder / "math-small", rank=4)
    flexmoe.compose(grafted, [folder / "math-expert", folder / "code-expert"], folder / "model", public_prior=0.0)
    shutil.copytree(folder / "model", folder / "path" / "to" / "model")
    flexmoe.keygen(folder / "keys" / "hospital")
    torch.manual_seed(0)
    config = FlexOlmoConfig(
        vocab_size=99, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_experts=3, num_experts_per_tok=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    FlexOlmoForCausalLM(config).save_pretrained(folder / "flex-olmo")
    return folder


def _words(count: int) -> list[str]:
    """Different words: no two documents may be equal, because copies stay on one side of a validation split."""
    letters = "abcdefghij"
    return [f"{letters[i // 10]}{letters[i % 10]}{letters[i % 7]}" for i in range(count)]


def _package(grafted: Path, name: str, out: Path, rank: int | None = None) -> Path:
    """An expert whose router rows have no bias, as `train_expert` makes them by default."""
    model = AutoModelForCausalLM.from_pretrained(grafted)
    model.add_expert_copy(name, rank=rank)
    perturb_expert(model, name)
    with torch.no_grad():
        for block in model.flexmoe_blocks():
            block.router[name].bias.zero_()
    return model.save_expert(name, out, license="cc-by-4.0", data_statement="Text written for the tests.")


@contextmanager
def hub_of_world(folder: Path, patch: pytest.MonkeyPatch) -> Iterator[None]:
    """A Hub that holds `HUB_EXPERTS`; adds the composition to `folder`."""
    with HubServer().running() as hub:
        hub.tokens.update(TOKENS)
        token_of = {user: token for token, user in TOKENS.items()}
        point_client_at(hub.url, patch, token=token_of["hospital"])
        for repository, package in HUB_EXPERTS.items():
            flexmoe.push(folder / package, repository, token=token_of[repository.split("/")[0]])
        flexmoe.compose_by_reference(
            folder / "grafted",
            ["hospital/derm-expert"],
            folder / "composition",
            anchor=folder / "anchor",
            public_prior=0.0,
        )
        yield


def copy_of_world(world: Path, to: Path) -> Path:
    """A copy that an example may change."""
    return Path(shutil.copytree(world, to, symlinks=True))
