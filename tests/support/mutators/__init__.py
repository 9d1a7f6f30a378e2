"""Attacks on expert packages by a malicious owner: each mutator turns a valid package into an invalid one.

Most update the SHA-256 in the manifest afterwards, so that the attack passes the hash. A mutator gets the package's
folder (it may also put files beside it) and a random generator, and returns a description: a `MayPass` if the result
may be accepted, provided that the expert equals that of the valid package; any other text if it must be refused.

This is the table of mutators. Does not cover running them (`tests/support/fuzzing.py`).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

from tests.support.mutators.damage import (
    bit_flip_in_another_file,
    bit_flip_in_header,
    bit_flip_in_manifest,
    bit_flip_in_weights,
    extension,
    harmless_files,
    missing_file,
    renamed_weights,
    swapped_files,
    truncation,
    unknown_weight_file,
)
from tests.support.mutators.headers import (
    bad_entry,
    bad_metadata,
    bad_offsets,
    big_header,
    header_over_the_limit,
    hostile_header,
    huge_header,
    nested_header,
    overlapping_tensors,
)
from tests.support.mutators.json_texts import (
    big_json,
    hostile_json,
    long_texts,
    missing_key,
    nested_json,
    wrong_types,
)
from tests.support.mutators.links import (
    invalid_index,
    link_in_a_circle,
    link_out,
    link_to_a_device,
    link_to_nothing,
    link_within,
    not_a_file,
    pipe,
)
from tests.support.mutators.manifests import (
    escaping_files,
    false_alpha,
    false_anchor,
    false_dtype,
    false_kind,
    false_layers,
    false_rank,
    false_version,
    false_widths,
    hostile_name,
    wrong_hash,
)
from tests.support.mutators.packages import MayPass
from tests.support.mutators.tensors import (
    extra_layer,
    extra_tensor,
    factor_scales,
    huge_tensor,
    missing_layer,
    missing_tensor,
    no_elements,
    not_finite,
    renamed_tensor,
    repeated_neurons,
    row_widths,
    swapped_tensors,
    tensor_in_two_files,
    too_large_a_number,
    unknown_dtype,
    wider_dtype,
    wrong_dtype,
    wrong_shape,
    wrong_size,
)

Mutator = Callable[[Path, random.Random], str]

MUTATORS: dict[str, Mutator] = {
    "bit flip in weights": bit_flip_in_weights,
    "bit flip in a header": bit_flip_in_header,
    "bit flip in the manifest": bit_flip_in_manifest,
    "bit flip in another file": bit_flip_in_another_file,
    "truncation": truncation,
    "extension": extension,
    "swapped files": swapped_files,
    "missing file": missing_file,
    "renamed weights": renamed_weights,
    "unknown weight file": unknown_weight_file,
    "harmless files": harmless_files,
    "wrong shape": wrong_shape,
    "wrong size": wrong_size,
    "wrong dtype": wrong_dtype,
    "unknown dtype": unknown_dtype,
    "wider dtype": wider_dtype,
    "too large a number": too_large_a_number,
    "not finite": not_finite,
    "no elements": no_elements,
    "huge tensor": huge_tensor,
    "factor scales": factor_scales,
    "repeated neurons": repeated_neurons,
    "row widths": row_widths,
    "missing tensor": missing_tensor,
    "extra tensor": extra_tensor,
    "renamed tensor": renamed_tensor,
    "swapped tensors": swapped_tensors,
    "tensor in two files": tensor_in_two_files,
    "missing layer": missing_layer,
    "extra layer": extra_layer,
    "huge header": huge_header,
    "header over the limit": header_over_the_limit,
    "bad offsets": bad_offsets,
    "overlapping tensors": overlapping_tensors,
    "bad entry": bad_entry,
    "bad metadata": bad_metadata,
    "hostile header": hostile_header,
    "nested header": nested_header,
    "big header": big_header,
    "link out": link_out,
    "link to nothing": link_to_nothing,
    "link in a circle": link_in_a_circle,
    "link to a device": link_to_a_device,
    "link within": link_within,
    "pipe": pipe,
    "not a file": not_a_file,
    "invalid index": invalid_index,
    "hostile JSON": hostile_json,
    "nested JSON": nested_json,
    "big JSON": big_json,
    "long texts": long_texts,
    "wrong types": wrong_types,
    "missing key": missing_key,
    "false layers": false_layers,
    "false rank": false_rank,
    "false alpha": false_alpha,
    "false widths": false_widths,
    "false dtype": false_dtype,
    "false anchor": false_anchor,
    "false kind": false_kind,
    "false version": false_version,
    "hostile name": hostile_name,
    "escaping files": escaping_files,
    "wrong hash": wrong_hash,
}

__all__ = ["MUTATORS", "MayPass", "Mutator"]
