"""The command line `flexmoe`: each command parses, makes one call of the library, and says what came of it.

It lies beside the package `flexmoe`, not inside it, because importing anything inside registers the model classes, and
with that torch and transformers: seconds that `flexmoe --help` or a mistyped option should not cost. Only the
commands' bodies import the library. `flexmoe.cli` gives the same `app` and `main` to those who look for them there.

It does NOT do anything that Python can't: every command names the function it calls.
"""

from flexmoe_cli.application import app, main

__all__ = ["app", "main"]
