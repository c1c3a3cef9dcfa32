"""`python -m keyferry` is the `keyferry` command."""

import sys

from .command import main

sys.exit(main())
