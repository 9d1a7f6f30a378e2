"""Text files to token sequences: reading documents, splitting them into training and validation, packing them.

Files are read one document at a time; no copy of the text is left anywhere. A network connection is opened for data
sets on the Hub only (`hf:owner/name`). Does not cover the mix of texts in training (`flexmoe.training.experts`).
"""

from flexmoe.data.documents import (
    END_OF_DOCUMENT,
    Documents,
    RowFormat,
    check_template_is_used,
    read_documents,
)
from flexmoe.data.files import check_output_apart, data_paths, find_sources
from flexmoe.data.public_sample import read_public_sample
from flexmoe.data.tokens import (
    LONGEST_SEQUENCE,
    TokenizedText,
    check_token_ids,
    cut_sequences,
    held_out,
    pack,
    split_documents,
    split_tokens,
    tokenize,
)

__all__ = [
    "END_OF_DOCUMENT",
    "LONGEST_SEQUENCE",
    "Documents",
    "RowFormat",
    "TokenizedText",
    "check_output_apart",
    "check_template_is_used",
    "check_token_ids",
    "cut_sequences",
    "data_paths",
    "find_sources",
    "held_out",
    "pack",
    "read_documents",
    "read_public_sample",
    "split_documents",
    "split_tokens",
    "tokenize",
]
