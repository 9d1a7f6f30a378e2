"""A model used through remote code by a user who has transformers but not FlexMoE; run by `test_remote_code.py`.

    python without_flexmoe.py JOB.json

The job names folders and repositories; results.json and logits.safetensors are written beside it. The packages that
FlexMoE needs in addition to transformers are hidden until the last step, which imports flexmoe.
"""

import json
import os
import sys
from pathlib import Path

HIDDEN = {"flexmoe", "flexmoe_cli", "triton", "peft", "typer", "rich", "datasets", "evaluate", "accelerate"}


class HidingFinder:
    """A module finder that does not find the packages in `HIDDEN`."""

    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in HIDDEN else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)


finders = list(sys.meta_path)
sys.meta_path[:] = [HidingFinder(finder) for finder in finders]

import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM  # noqa: E402

JOB = json.loads(Path(sys.argv[1]).read_text())
OUT = Path(sys.argv[1]).parent
TOKENS = torch.tensor(JOB["tokens"])
TRUST = {"trust_remote_code": True}

results, logits = {}, {}


@torch.no_grad()
def record(name, model):
    """Records the model's logits (or hidden states) as `name`, after copying its tensors to aligned memory."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    out = model(TOKENS)
    logits[name] = out["logits" if "logits" in out else "last_hidden_state"].clone()
    return model


results["config"] = AutoConfig.from_pretrained(JOB["merged"], **TRUST).expert_names
record("decoder", AutoModel.from_pretrained(JOB["merged"], **TRUST))
model = record("merged", AutoModelForCausalLM.from_pretrained(JOB["merged"], **TRUST))
results["class"] = [type(model).__module__.split(".")[0], type(model).__name__]
chosen = model.generate(TOKENS, experts=["public", "math"], max_new_tokens=5, do_sample=False)
results["generated"] = chosen.tolist()

results["refused"] = {}


def refused(name, call):
    """Records the ImportError that `call` raises."""
    try:
        call()
    except ImportError as error:
        results["refused"][name] = str(error)


refused("add_expert", lambda: model.add_expert(JOB["code"]))
refused("replace_expert", lambda: model.replace_expert("code", JOB["code"]))
refused("add_expert_copy", lambda: model.add_expert_copy("new"))
refused("save_expert", lambda: model.save_expert("code", OUT / "package"))
refused("push_expert_to_hub", lambda: model.push_expert_to_hub("code", "lab/again"))
refused("push_to_hub", lambda: model.push_to_hub("lab/again"))
refused("save_composition", lambda: model.save_composition(OUT / "composition", sources=JOB["sources"]))
refused("prepack_for_cpu", lambda: model.prepack_for_cpu())
refused("implementation_paths", lambda: model.implementation_paths())
refused("loading a composition", lambda: AutoModelForCausalLM.from_pretrained(JOB["composition"], **TRUST))
record("after refusals", model)

results["implementation"] = model.config._experts_implementation
try:
    model.set_experts_implementation("flexmoe_cpu")
except ValueError as error:
    results["other implementation"] = str(error)

with model.only_experts("public", "math"):
    record("masked code", model)
model.set_active_experts(["public", "math"])
record("inactive code", model)
model.set_active_experts(None)
model.rename_expert("code", "source")
model.rename_expert("source", "code")
model.save_pretrained(OUT / "saved")
record("saved", AutoModelForCausalLM.from_pretrained(OUT / "saved", **TRUST))
model.remove_expert("code")
record("without code", model)
model.save_pretrained(OUT / "saved-without-code")
record("saved without code", AutoModelForCausalLM.from_pretrained(OUT / "saved-without-code", **TRUST))

hub = record("merged on the Hub", AutoModelForCausalLM.from_pretrained(JOB["hub_merged"], **TRUST))
hub.save_pretrained(OUT / "saved-from-hub")

results["hidden but imported"] = sorted({name.split(".")[0] for name in sys.modules} & HIDDEN)

sys.meta_path[:] = finders
import flexmoe  # noqa: E402

ours = record("package after remote code", AutoModelForCausalLM.from_pretrained(JOB["merged"], **TRUST))
results["the package's class"] = isinstance(ours, flexmoe.FlexMoeForCausalLM)
with flexmoe.track_usage(hub) as usage:
    record("remote model with the package imported", hub)
results["usage"] = usage.tokens
hub.remove_expert("code")
hub.add_expert(JOB["hub_code"])
record("added from the Hub", hub)
results["source"] = hub.config.experts[-1]["source"]["repo"]
results["name of an opened package"] = hub.add_expert(flexmoe.ExpertPackage.open(JOB["code"]), name="again")
hub.remove_expert("again")
hub.save_composition(OUT / "composition", sources=JOB["sources"])
record("saved composition", AutoModelForCausalLM.from_pretrained(OUT / "composition", **TRUST))
record("composition on the Hub", AutoModelForCausalLM.from_pretrained(JOB["hub_composition"], **TRUST))

save_file(logits, OUT / "logits.safetensors")
(OUT / "results.json").write_text(json.dumps({**results, "home": os.environ["HF_HOME"]}))
