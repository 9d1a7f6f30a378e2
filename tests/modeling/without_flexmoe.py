"""What a reader does who has transformers and not FlexMoE: run by `test_remote_code.py` in a process of its own.

    python without_flexmoe.py JOB.json

The job names folders and repositories; what came out is written beside it, JSON and logits. Packages that FlexMoE
has beside transformers' own are made as if they were not installed, until the last step, which imports flexmoe.
"""

import json
import os
import sys
from pathlib import Path

ABSENT = {"flexmoe", "flexmoe_cli", "triton", "peft", "typer", "rich", "datasets", "evaluate", "accelerate"}


class Without:
    """A finder of modules that does not find those of `ABSENT`."""

    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in ABSENT else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)


finders = list(sys.meta_path)
sys.meta_path[:] = [Without(finder) for finder in finders]

import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM  # noqa: E402

JOB = json.loads(Path(sys.argv[1]).read_text())
OUT = Path(sys.argv[1]).parent
TOKENS = torch.tensor(JOB["tokens"])
TRUST = {"trust_remote_code": True}

found, logits = {}, {}


@torch.no_grad()
def look(name, model):
    """Notes the model's logits (or hidden states) under `name`; its tensors get memory of their own first."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    out = model(TOKENS)
    logits[name] = out["logits" if "logits" in out else "last_hidden_state"].clone()
    return model


found["config"] = AutoConfig.from_pretrained(JOB["merged"], **TRUST).expert_names
look("decoder", AutoModel.from_pretrained(JOB["merged"], **TRUST))
model = look("merged", AutoModelForCausalLM.from_pretrained(JOB["merged"], **TRUST))
found["class"] = [type(model).__module__.split(".")[0], type(model).__name__]
chosen = model.generate(TOKENS, experts=["public", "math"], max_new_tokens=5, do_sample=False)
found["generated"] = chosen.tolist()

model.remove_expert("code")
look("without code", model)
model.add_expert(JOB["code"])
look("with code again", model)
model.save_pretrained(OUT / "saved")
look("saved", AutoModelForCausalLM.from_pretrained(OUT / "saved", **TRUST))
model.save_composition(OUT / "by-reference", sources=JOB["sources"])
look("saved composition", AutoModelForCausalLM.from_pretrained(OUT / "by-reference", **TRUST))
look("composition", AutoModelForCausalLM.from_pretrained(JOB["composition"], **TRUST))

hub = look("merged on the Hub", AutoModelForCausalLM.from_pretrained(JOB["hub_merged"], **TRUST))
hub.remove_expert("code")
hub.add_expert(JOB["hub_code"])
look("added from the Hub", hub)
found["source"] = hub.config.experts[-1]["source"]["repo"]
look("composition on the Hub", AutoModelForCausalLM.from_pretrained(JOB["hub_composition"], **TRUST))
hub.save_pretrained(OUT / "saved-from-hub")

found["absent but imported"] = sorted({name.split(".")[0] for name in sys.modules} & ABSENT)

sys.meta_path[:] = finders
import flexmoe  # noqa: E402

ours = look("package after remote code", AutoModelForCausalLM.from_pretrained(JOB["merged"], **TRUST))
found["the package's class"] = isinstance(ours, flexmoe.FlexMoeForCausalLM)
with flexmoe.track_usage(hub) as usage:
    look("remote model after the package came", hub)
found["usage"] = usage.tokens
found["named by an opened package"] = hub.add_expert(flexmoe.ExpertPackage.open(JOB["code"]), name="again")

save_file(logits, OUT / "logits.safetensors")
(OUT / "found.json").write_text(json.dumps({**found, "home": os.environ["HF_HOME"]}))
