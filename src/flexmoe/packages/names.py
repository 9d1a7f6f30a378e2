"""Names of a low-rank expert's tensors in an expert package, which are PEFT's, and in a model.

The model itself uses other names, because PEFT treats every module with its own names as part of an adapter. Does not
cover the rest of a package's tensor names (`package`).
"""

_PACKED = ((".A.weight", ".lora_A.weight"), (".B.weight", ".lora_B.weight"), (".B.bias", ".bias_delta"))


def packed_name(key: str) -> str:
    """The name in a package of the tensor `key` of a low-rank expert; other names stay."""
    return next((key.removesuffix(ours) + theirs for ours, theirs in _PACKED if key.endswith(ours)), key)


def unpacked_name(key: str) -> str:
    """The name in a low-rank expert of the tensor that a package calls `key`; other names stay."""
    return next((key.removesuffix(theirs) + ours for ours, theirs in _PACKED if key.endswith(theirs)), key)


__all__ = ["packed_name", "unpacked_name"]
