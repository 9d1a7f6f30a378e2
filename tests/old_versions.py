"""What does not hold with the oldest supported versions: tests that must fail there, each with the reason.

A test of the table that passes, or one outside of it that fails, is a failure. Does not cover optional libraries.
"""

import sys
from importlib.metadata import version

import pytest
from packaging.version import Version

_OLD_TRANSFORMERS = Version(version("transformers")) < Version("5.18")
_OLD_DYNAMO = Version(version("torch")) < Version("2.11") and sys.version_info < (3, 11)

_FAMILIES = "tests/modeling/test_families.py::"
_OTHER_WORDS = "no anchor there either, but transformers says so in other words"

KNOWN: dict[str, tuple[bool, str]] = {
    f"{_FAMILIES}test_family[cohere_compass_text]": (_OLD_TRANSFORMERS, "transformers cannot build its dense model"),
    f"{_FAMILIES}test_family[modernbert-decoder]": (_OLD_TRANSFORMERS, "transformers cannot read its config back"),
    f"{_FAMILIES}test_an_exception_is_one[gemma4_assistant]": (_OLD_TRANSFORMERS, _OTHER_WORDS),
    f"{_FAMILIES}test_an_exception_is_one[gemma4_unified_assistant]": (_OLD_TRANSFORMERS, _OTHER_WORDS),
    f"{_FAMILIES}test_an_exception_is_one[musicgen]": (_OLD_TRANSFORMERS, _OTHER_WORDS),
    f"{_FAMILIES}test_an_exception_is_one[musicgen_melody]": (_OLD_TRANSFORMERS, _OTHER_WORDS),
    "tests/modeling/test_devices.py::test_experts_come_and_go_while_weights_are_on_disk[gpt2-everything]": (
        _OLD_TRANSFORMERS,
        "with accelerate 1.10, device_map cannot put a whole model on disk",
    ),
    "tests/modeling/test_forward.py::test_compiled_code_follows_the_active_set_and_refuses_scopes": (
        _OLD_DYNAMO,
        "refused, but Dynamo does not pass the words of the error on",
    ),
}


def expect_known_failures(items: list[pytest.Item]) -> None:
    """Marks the tests of the table that these versions fail."""
    for item in items:
        applies, reason = KNOWN.get(item.nodeid, (False, ""))
        if applies:
            item.add_marker(pytest.mark.xfail(reason=reason, strict=True))
