"""A tiny dense checkpoint, so that the examples run offline within seconds.

It stands for any dense causal language model: with a real one, pass its Hub id or folder, such as
"HuggingFaceTB/SmolLM2-135M", wherever an example passes the folder that `tiny_anchor` returns. The weights are random,
so the text that the examples generate has no meaning.
"""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789 .,:;+-*/=()\n"


def tiny_anchor(folder: Path) -> Path:
    """Saves a random two-layer Llama and a character-level tokenizer in `folder`."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *CHARACTERS])}
    characters = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    characters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    characters.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=characters, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_texts(folder: Path) -> tuple[Path, Path]:
    """Two text files: public text, and the text of one data owner."""
    public, own = folder / "public.txt", folder / "problems.txt"
    end = "\n<|endofdocument|>\n"
    public.write_text(
        end.join(f"on day {i} the rain fell on the hills and the river rose." for i in range(60)), encoding="utf-8"
    )
    own.write_text(
        end.join(f"problem {i}: find x. x + {i} = {3 * i}; x = {2 * i}." for i in range(60)), encoding="utf-8"
    )
    return public, own
