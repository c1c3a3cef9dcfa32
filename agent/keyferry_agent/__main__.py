"""`python -m keyferry_agent` is the `keyferry-agent` command."""

import sys

from .command import main

sys.exit(main())
