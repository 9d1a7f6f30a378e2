"""A word tokenizer, which needs no training and has a word for each id of the tiny anchors."""

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from flexmoe.testing import VOCABULARY


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word: "w3" has the id 3. There are no special tokens."""
    backend = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w1"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend)
