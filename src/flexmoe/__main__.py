"""`python -m flexmoe`: the command line, for where its script is not on the path."""

import sys

from flexmoe_cli import main

sys.exit(main())
