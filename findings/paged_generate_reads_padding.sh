#!/bin/sh
# transformers 5.23.0, torch 2.13.0: generate(cache_implementation="paged") ignores attention_mask.
#
# Guess: the padding of a batch is masked as in any other generate, and the result has the same shape.
# Seen: padding on the left is read as text, so a padded prompt is continued otherwise, without a warning about it; and
# the result has one dimension more, [1, batch, length].
#
#   shape of the paged result: (1, 2, 11)
#   dense:    [[3, 23, 15, 79, 13], [88, 80, 64, 42, 73]]
#   paged:    [[3, 23, 15, 79, 13], [8, 94, 58, 56, 22]]
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
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.generation import ContinuousBatchingConfig

torch.manual_seed(0)
sizes = dict(vocab_size=99, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
model = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, pad_token_id=0)).eval()
prompts = torch.tensor([[5, 6, 7, 8, 9, 10], [0, 0, 0, 20, 21, 22]])  # the second is padded on the left
mask = (prompts != 0).long()
settings = dict(max_new_tokens=5, do_sample=False, pad_token_id=0, attention_mask=mask)
dense = model.generate(prompts, eos_token_id=None, **settings)[:, 6:]
small = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)
paged = model.generate(
    prompts, eos_token_id=-1, cache_implementation="paged", continuous_batching_config=small, **settings
)
unpadded = model.generate(prompts[1:, 3:], max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=None)[:, 3:]
print("shape of the paged result:", tuple(paged.shape))
print("dense:   ", dense.tolist())
print("paged:   ", paged[0, :, 6:].tolist())
assert paged.shape == (1, 2, 11)
assert torch.equal(dense[1:], unpadded)
assert torch.equal(paged[0, 0, 6:], dense[0])
assert not torch.equal(paged[0, 1, 6:], dense[1])
PYTHON
cd "$folder"
"$folder/venv/bin/python" check.py
