"""The memory that training takes for the text of a file of 200 MB, in a process of its own."""

import json
import random
import string
import subprocess
import sys
from pathlib import Path

import pytest

MEGABYTES = 200

CHILD = """
import resource, string, sys
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from flexmoe.data import Documents
from flexmoe.training.text import pack_text, read_sides

words = Tokenizer(models.WordLevel({"<eos>": 0, **{c: i for i, c in enumerate(string.ascii_letters, 1)}}, "<eos>"))
words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
read = read_sides({"own": Documents([sys.argv[1]])}, tokenizer, validation_fraction=0.05, seed=0, vocab_size=100)
text = pack_text(read, sequence_length=1024, validation_tokens=20_000, seed=0)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(text.counts["own"].tokens + text.counts["own"].held_out_tokens, (after - before) * 1024)
"""


@pytest.mark.parametrize("shape", ["rows", "documents", "one document"])
def test_the_text_of_a_large_file(tmp_path: Path, shape: str) -> None:
    file = tmp_path / ("own.jsonl" if shape == "rows" else "own.txt")
    chance = random.Random(0)
    lines = ["".join(chance.choices(string.ascii_lowercase, k=5)) + " " for _ in range(2000)]
    size = 0
    with file.open("w") as out:
        while size < MEGABYTES * 1_000_000:
            text = "".join(chance.choices(lines, k=chance.randint(20, 500)))
            row = json.dumps({"text": text, "id": size}) if shape == "rows" else text
            size += out.write(row + ("\n<|endofdocument|>\n" if shape == "documents" else "\n"))
    if shape == "one document":  # another one to hold out
        with file.open("a") as out:
            out.write("<|endofdocument|>\n" + "a " * 2000)
    process = subprocess.run([sys.executable, "-c", CHILD, file], capture_output=True, text=True, check=True)
    tokens, peak = map(int, process.stdout.split())
    # the only copy of the tokens, with room to grow; one long document is held as text, and while it is decoded
    allowed = 4 * tokens * 1.2 + 60_000_000 + (3 * size if shape == "one document" else 0)
    assert peak < allowed, f"{peak / 1e6:.0f} MB for {tokens:,} tokens"
