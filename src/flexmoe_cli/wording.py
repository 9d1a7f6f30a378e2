"""Messages of the library in the words of the command line: its options instead of Python's arguments.

The library's messages name both, `--overwrite (overwrite=True)`, or the argument alone, `router_tokens=0`. On the
command line, only the option is shown. Does not cover messages that name a complete command.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Arguments of the library whose option has another name.
RENAMED = {"experts": "expert", "names": "name", "version": "expert_version", "verify": "no_verify"}

# A call in a message is code to be run in Python, so it stays: from_pretrained(folder, dtype=...).
_CALL = r"[\w\]]\((?:[^()]|\([^()]*\))*\)"
_OPTION_AND_ARGUMENT = re.compile(r"(?P<option>--[a-z][a-z-]*[^()]{0,60}?) \((?P<argument>[a-z_]+)\b(?:[=,][^()]*)?\)")
# As Python shows them; a bare word is a placeholder of the command line: name=file.
_VALUE = r"'[^']*'|\[[^]]*\]|[+-]?\d(?:[\w.+-]*\w)?|True|False|None|\.\.\."
_ARGUMENT = re.compile(rf"(?P<call>{_CALL})|(?<![\w.-])(?P<name>[a-z_]+)=(?P<value>{_VALUE})?(?![\w{{/])")
_SAME_TWICE = re.compile(r"(--[a-z-]+) \(\1\)")


@dataclass(frozen=True)
class Options:
    """The options of a command, by the names of its parameters: `--router-bias`, and `--no-router-bias` for False."""

    on: Mapping[str, str]
    off: Mapping[str, str]

    @classmethod
    def of(cls, parameters: Sequence[Any]) -> "Options":
        """The options among the parameters of a command of typer."""
        given = [each for each in parameters if any(option.startswith("--") for option in each.opts)]
        on = {each.name: max(each.opts, key=len) for each in given}
        off = {each.name: max(each.secondary_opts, key=len) for each in given if each.secondary_opts}
        return cls(on, off)

    def reword(self, message: str) -> str:
        """The message with the command's options instead of Python's arguments."""
        reworded = _ARGUMENT.sub(self._as_option, _OPTION_AND_ARGUMENT.sub(self._option_alone, message))
        return _SAME_TWICE.sub(r"\1", reworded)

    def _option_alone(self, match: re.Match[str]) -> str:
        argument = match["argument"]
        names = (argument, RENAMED.get(argument, argument))
        is_pair = any(f"--{name.replace('_', '-')}" in match["option"].split() for name in names)
        return match["option"] if is_pair else match[0]

    def _as_option(self, match: re.Match[str]) -> str:
        name = match["name"] and (match["name"] if match["name"] in self.on else RENAMED.get(match["name"], ""))
        if match["call"] or name not in self.on:
            return match[0]
        value = (match["value"] or "").strip("'")
        if value == "None":
            return f"{self.on[name]} (not given)"
        if value == "False" and name in self.off:
            return self.off[name]
        return self.on[name] if value in ("", "True", "...") else f"{self.on[name]} {value}"


__all__ = ["RENAMED", "Options"]
