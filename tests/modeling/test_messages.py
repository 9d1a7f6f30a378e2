"""A plain session with a FlexMoE says nothing that its user can't act on: no warning, no log line.

It runs in a process of its own, because the library says many things only once. Does not cover what is said on purpose
(a modified anchor, in `test_loading`; adapters that take several owners' modules, in `test_adapters`).
"""

import os
import re
import subprocess
import sys
from pathlib import Path

SESSION = """
import sys
from pathlib import Path

import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, pipeline

import flexmoe
from flexmoe.demo.anchor import END_OF_TEXT, train_tokenizer
from flexmoe.modeling import FlexMoeConfig, FlexMoeForCausalLM
from flexmoe.testing import perturb_expert, tiny_anchor

folder = Path(sys.argv[1])
tokenizer = train_tokenizer(["Problem 1. Find x: x + 1 = 2."], 280)
config = tiny_anchor("llama").config
config.vocab_size = len(tokenizer)
config.pad_token_id = config.bos_token_id = config.eos_token_id = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
model = FlexMoeForCausalLM(FlexMoeConfig(anchor_config=config, experts=["public", "math"], num_experts_per_tok=2))
perturb_expert(model, "math")
model.save_pretrained(folder / "model")
tokenizer.save_pretrained(folder / "model")

AutoModel.from_pretrained(folder / "model")
AutoModelForCausalLM.from_pretrained(folder / "model", dtype="auto", attn_implementation="eager", device_map="cpu")
model = AutoModelForCausalLM.from_pretrained(folder / "model")
tokenizer = AutoTokenizer.from_pretrained(folder / "model")
prompt = tokenizer("Find x: x", return_tensors="pt")
options = {"max_new_tokens": 3}
for way in ({}, {"do_sample": True}, {"num_beams": 2}, {"cache_implementation": "static"}, {"experts": ["public"]}):
    model.generate(**prompt, **options, **way)
speaker = pipeline("text-generation", model=str(folder / "model"), device="cpu")
speaker(["Find", "x"], batch_size=2, **options)
pipeline("feature-extraction", model=str(folder / "model"), device="cpu")("Find")

model.freeze_except("math")
row = torch.tensor(tokenizer("Find x: x + 1 = 2.")["input_ids"])
settings = {"max_steps": 2, "save_steps": 1, "use_cpu": True, "report_to": [], "disable_tqdm": True}
arguments = TrainingArguments(str(folder / "run"), **settings)
Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row}] * 4, processing_class=tokenizer).train()
model.save_expert("math", folder / "math")
model.remove_expert("math")
model.add_expert(folder / "math")
model.save_pretrained(folder / "again")
"""


# What other libraries say when they are imported, whatever the model: a pattern, and who says it.
OF_OTHERS = {
    r"^Failed to load \S*torchao": "torchao, of kernels for GPUs that are not there",
    r"torch/utils/_pytree\.py.* is an Enum subclass": "torch, of enumerations in torchao",
    r"^Skipping import of cpp extensions": "torchao, of a torch that is older than its kernels",
    r"generation-related arguments|Both `max_new_tokens`|clean_up_tokenization": "transformers 5.17's text pipeline",
}


def test_a_plain_session_is_silent(tmp_path: Path) -> None:
    quiet = {**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
    session = subprocess.run(
        [sys.executable, "-c", SESSION, str(tmp_path)], env=quiet, capture_output=True, text=True, timeout=300
    )
    assert session.returncode == 0, session.stderr
    ours = [line for line in session.stderr.splitlines() if not any(re.search(said, line) for said in OF_OTHERS)]
    assert ours == []
