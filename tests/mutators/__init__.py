"""Attacks on expert packages by the one who signs them off: each takes a good package and leaves a bad one.

Most put the right SHA-256 into the manifest afterwards, so that the attack gets past the hash. A mutator takes the
package's folder (it may put things beside it, too) and a source of chance, and says what it did: `MayPass` where the
result may be accepted, if the expert is then that of the good package; any other text, where it must be refused.

Here is the table of them. Not here: what becomes of them (`tests/fuzzing.py`).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

from tests.mutators.damage import (
    bit_flip_beside,
    bit_flip_in_header,
    bit_flip_in_manifest,
    bit_flip_in_weights,
    extension,
    harmless_company,
    missing_file,
    renamed_weights,
    stranger_beside,
    swapped_files,
    truncation,
)
from tests.mutators.headers import (
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
from tests.mutators.json_texts import big_json, hostile_json, missing_key, nested_json, wrong_types
from tests.mutators.links import (
    index_games,
    link_in_a_circle,
    link_out,
    link_to_a_device,
    link_to_nothing,
    link_within,
    no_file,
    pipe,
)
from tests.mutators.manifests import (
    escaping_files,
    hostile_name,
    lie_of_alpha,
    lie_of_anchor,
    lie_of_dtype,
    lie_of_kind,
    lie_of_layers,
    lie_of_rank,
    lie_of_version,
    lie_of_widths,
    wrong_hash,
)
from tests.mutators.packages import MayPass
from tests.mutators.tensors import (
    extra_layer,
    extra_tensor,
    huge_tensor,
    missing_layer,
    missing_tensor,
    no_numbers,
    not_finite,
    renamed_tensor,
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
    "bit flip beside": bit_flip_beside,
    "truncation": truncation,
    "extension": extension,
    "swapped files": swapped_files,
    "missing file": missing_file,
    "renamed weights": renamed_weights,
    "stranger beside": stranger_beside,
    "harmless company": harmless_company,
    "wrong shape": wrong_shape,
    "wrong size": wrong_size,
    "wrong dtype": wrong_dtype,
    "unknown dtype": unknown_dtype,
    "wider dtype": wider_dtype,
    "too large a number": too_large_a_number,
    "not finite": not_finite,
    "no numbers": no_numbers,
    "huge tensor": huge_tensor,
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
    "no file": no_file,
    "index games": index_games,
    "hostile JSON": hostile_json,
    "nested JSON": nested_json,
    "big JSON": big_json,
    "wrong types": wrong_types,
    "missing key": missing_key,
    "lie of layers": lie_of_layers,
    "lie of rank": lie_of_rank,
    "lie of alpha": lie_of_alpha,
    "lie of widths": lie_of_widths,
    "lie of dtype": lie_of_dtype,
    "lie of the anchor": lie_of_anchor,
    "lie of kind": lie_of_kind,
    "lie of the version": lie_of_version,
    "hostile name": hostile_name,
    "escaping files": escaping_files,
    "wrong hash": wrong_hash,
}

__all__ = ["MUTATORS", "MayPass", "Mutator"]
