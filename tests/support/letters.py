"""A character tokenizer, which needs no training."""

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from flexmoe.testing import VOCABULARY

LETTERS = "abcdefghijklmnopqrstuvwxyz .\n"
SPECIAL = {"<pad>": 0, "<s>": 1, "</s>": 2}


def letter_tokenizer() -> PreTrainedTokenizerFast:
    """A character tokenizer for the tiny anchors of `flexmoe.testing`; ids of pad (and unknown), bos, eos: 0, 1, 2."""
    vocabulary = {**SPECIAL, **{letter: len(SPECIAL) + i for i, letter in enumerate(LETTERS)}}
    assert len(vocabulary) <= VOCABULARY
    model = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    model.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=model, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
