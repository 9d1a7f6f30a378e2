#!/bin/sh
# PEFT 0.21.2: GenKnowSub (ArrowConfig(use_gks=True)) subtracts the factors of a general adapter, not its update.
#
# Guess: what is subtracted from a task adapter is the general adapter's update, B_g A_g. So if both adapters make the
# same update, nothing is left of the task adapter, whatever factors the update is written in.
# Seen: A - A_g and B - B_g. The general adapter here is the task adapter with A halved and B doubled, which is the same
# function. Half of its update is left, with the sign reversed; with A doubled and B halved as well. How much is
# subtracted depends on how the training happened to divide an update between A and B.
#
#   largest difference between the two adapters' outputs: 0.0
#   the task adapter's update after GenKnowSub, as a multiple of what it was: -0.5
#
# Exits with an error if that changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
"$folder/venv/bin/pip" install --quiet transformers==5.23.0 peft==0.21.2
cat > "$folder/check.py" <<'PYTHON'
import torch
from peft import LoraConfig, create_arrow_model, get_peft_model
from peft.tuners.lora.config import ArrowConfig
from transformers import LlamaConfig, LlamaForCausalLM

sizes = dict(vocab_size=99, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
ids = torch.tensor([[5, 6, 7]])


def base():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**sizes)).eval()


outputs = {}
for name, factor in (("task", 1.0), ("general", 2.0)):
    model = get_peft_model(base(), LoraConfig(r=4, lora_alpha=4, target_modules=["up_proj"])).eval()
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    torch.manual_seed(1)
    a, b = torch.randn(4, 32), torch.randn(64, 4)
    layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data = a / factor, b * factor
    with torch.no_grad():
        outputs[name] = model(ids).logits
    model.save_pretrained(name)
print("largest difference between the two adapters' outputs:", (outputs["task"] - outputs["general"]).abs().max().item())
assert torch.equal(outputs["task"], outputs["general"])

arrow = create_arrow_model(
    base(), ["task"], ArrowConfig(top_k=1, use_gks=True, rng_seed=0), general_adapter_paths=["general"]
).eval()
with torch.no_grad():
    arrow(ids)  # the subtraction takes place in the first forward pass
layer = arrow.base_model.model.model.layers[0].mlp.up_proj
update, before = layer.lora_B["task_0"].weight @ layer.lora_A["task_0"].weight, b / 2 @ (2 * a)
left = (update * before).sum() / before.square().sum()
print("the task adapter's update after GenKnowSub, as a multiple of what it was:", round(left.item(), 4))
assert torch.allclose(update, -0.5 * before, atol=1e-5)
PYTHON
cd "$folder"
"$folder/venv/bin/python" check.py
