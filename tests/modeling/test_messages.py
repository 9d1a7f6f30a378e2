"""Ordinary use of a FlexMoE prints no warning and no log line.

Runs in a new process, because transformers logs many messages only once. Does not cover intended warnings (a modified
anchor, in `test_loading`; adapters on several owners, in `test_adapters`).
"""

import os
import re
import subprocess
import sys
from pathlib import Path

PROGRAM = """
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
for mode in ({}, {"do_sample": True}, {"num_beams": 2}, {"cache_implementation": "static"}, {"experts": ["public"]}):
    model.generate(**prompt, **options, **mode)
generator = pipeline("text-generation", model=str(folder / "model"), device="cpu")
generator(["Find", "x"], batch_size=2, **options)
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


# Messages of other libraries that do not depend on the model: a pattern, and the library.
FROM_LIBRARIES = {
    r"^Failed to load \S*torchao": "torchao, about kernels for missing GPUs",
    r"torch/utils/_pytree\.py.* is an Enum subclass": "torch, about enumerations in torchao",
    r"^Skipping import of cpp extensions": "torchao, with a torch that is older than its kernels",
    r"generation-related arguments|Both `max_new_tokens`|clean_up_tokenization": "transformers 5.17's text pipeline",
}


def test_ordinary_use_prints_nothing(tmp_path: Path) -> None:
    environment = {**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert process.returncode == 0, process.stderr
    lines = process.stderr.splitlines()
    assert [line for line in lines if not any(re.search(pattern, line) for pattern in FROM_LIBRARIES)] == []
