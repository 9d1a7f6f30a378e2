#!/bin/sh
# transformers 5.23.0, gguf 0.19.0: scaling of rotary frequencies in a GGUF file is dropped without a message.
#
# Guess: a Llama whose file has `llama.rope.scaling.type` and `.factor`, or the tensor rope_freqs.weight (how Llama 3.1
# and later store their scaling), is loaded with that scaling, or refused.
# Seen: rope_parameters has type "default", the tensor is not used, and the loading info has no unexpected key: the logits
# are those of a model without scaling.
#
#   linear, factor 4      rope_parameters: {'rope_theta': 10000.0, 'rope_type': 'default'}  unexpected keys: []
#   rope_freqs.weight     rope_parameters: {'rope_theta': 10000.0, 'rope_type': 'default'}  unexpected keys: []
#
# Exits with an error if that changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
"$folder/venv/bin/pip" install --quiet transformers==5.23.0 gguf==0.19.0 accelerate==1.15.0
cat > "$folder/check.py" <<'PYTHON'
import gguf
import numpy as np
from transformers import AutoModelForCausalLM

H, F, V, HEADS = 64, 96, 32, 2
generator = np.random.default_rng(0)


def write(path, *, linear=False, freqs=False):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(4096)
    writer.add_embedding_length(H)
    writer.add_feed_forward_length(F)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(H // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(V)
    if linear:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(4.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{i}" for i in range(V)])
    writer.add_token_merges(["t 1"])
    shapes = {"token_embd": (V, H), "output": (V, H), "blk.0.ffn_gate": (F, H), "blk.0.ffn_up": (F, H)}
    shapes |= {"blk.0.ffn_down": (H, F)} | {f"blk.0.attn_{part}": (H, H) for part in ("q", "k", "v", "output")}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", generator.normal(0, 0.1, shape).astype(np.float32))
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(H, np.float32))
    if freqs:
        writer.add_tensor("rope_freqs.weight", np.linspace(1, 8, H // HEADS // 2, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


for name, options in {"linear, factor 4": {"linear": True}, "rope_freqs.weight": {"freqs": True}}.items():
    write("model.gguf", **options)
    model, info = AutoModelForCausalLM.from_pretrained(".", gguf_file="model.gguf", output_loading_info=True)
    unexpected = sorted(info["unexpected_keys"])
    print(f"{name:20}  rope_parameters: {model.config.rope_parameters}  unexpected keys: {unexpected}")
    assert model.config.rope_parameters["rope_type"] == "default"
    assert not unexpected
PYTHON
cd "$folder"
"$folder/venv/bin/python" check.py
