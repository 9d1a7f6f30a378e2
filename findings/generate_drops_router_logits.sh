#!/bin/sh
# transformers 5.23.0: generate accepts output_router_logits=True and returns none.
#
# Guess: with return_dict_in_generate=True they are returned as attentions and hidden states are; or the keyword is
# refused, as other unknown ones are.
# Seen: it is accepted and passed to each forward pass, whose router logits are computed and dropped.
#
#   forward:  aux_loss, logits, past_key_values, hidden_states, attentions, router_logits
#   generate: sequences, attentions, hidden_states, past_key_values
#
# Exits with an error if that changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
"$folder/venv/bin/pip" install --quiet transformers==5.23.0
cat > "$folder/check.py" <<'PYTHON'
import torch
from transformers import MixtralConfig, MixtralForCausalLM

torch.manual_seed(0)
sizes = dict(vocab_size=99, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
config = MixtralConfig(**sizes, num_key_value_heads=2, num_local_experts=4, attn_implementation="eager")
model = MixtralForCausalLM(config).eval()
ids = torch.tensor([[5, 6, 7]])
wanted = dict(output_router_logits=True, output_attentions=True, output_hidden_states=True)
forward = model(ids, **wanted)
generated = model.generate(
    ids, max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0, return_dict_in_generate=True, **wanted
)
print("forward: ", list(forward.keys()))
print("generate:", list(generated.keys()))
assert "router_logits" in forward
assert {"attentions", "hidden_states"} <= generated.keys()
assert "router_logits" not in generated
PYTHON
cd "$folder"
"$folder/venv/bin/python" check.py
