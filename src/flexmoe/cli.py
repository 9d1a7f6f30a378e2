"""The command line under the library's name: `python -m flexmoe.cli`. It lives in `flexmoe_cli`, which says why."""

import sys

from flexmoe_cli import app, main

__all__ = ["app", "main"]

if __name__ == "__main__":
    sys.exit(main())
