#!/bin/sh
# transformers 5.23.0, tokenizers 0.23.3: an auto_map in tokenizer_config.json that is not trusted changes the token ids.
#
# Guess: with trust_remote_code=False an auto_map has no effect beyond, at most, a message.
# Seen: AutoTokenizer skips its rules per model_type where there is an auto_map, trusted or not, and takes the declared
# tokenizer_class, which rebuilds the pre-tokenizer: the same files give other ids, silently.
#
#   without auto_map: TokenizersBackend [87, 220, 28, 220, 261, 258, 260, 88]
#   with auto_map:    GPT2Tokenizer [87, 220, 28, 220, 261, 258, 256, 198, 88]
#
# Exits with an error if that changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
"$folder/venv/bin/pip" install --quiet transformers==5.23.0 tokenizers==0.23.3
cat > "$folder/check.py" <<'PYTHON'
import json
import tempfile
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, Olmo2Config

tokenizer = Tokenizer(models.BPE())
split = pre_tokenizers.Split(Regex(r"\p{N}{1,3}|[^\S\n]+|\n+|[^\s\p{N}]+"), behavior="isolated")
byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
alphabet = pre_tokenizers.ByteLevel.alphabet()
trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
tokenizer.train_from_iterator(["x = 12345\n\n\ny = 678\n"] * 9, trainer)
results = []
for auto_map in ({}, {"auto_map": {"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]}}):
    folder = Path(tempfile.mkdtemp())
    Olmo2Config().save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer", **auto_map}))
    loaded = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    results.append((type(loaded).__name__, loaded("x = 12345\n\n\ny")["input_ids"]))
    print("with auto_map:   " if auto_map else "without auto_map:", *results[-1])
assert [name for name, _ in results] == ["TokenizersBackend", "GPT2Tokenizer"]
assert results[0][1] != results[1][1]
PYTHON
cd "$folder"
"$folder/venv/bin/python" check.py
