"""The V2 SDK for Python as `make bench` measures it: `python -m foreign.sdk.timed` (see tests/bench/measure/gateway.py).

The first line of standard input has the settings of a client, the action's name and its parameters. Each further line has a
number of seconds, and is answered with the calls per second in that time.
"""

import json
import sys
import time

from foreign.sdk import v2


def main() -> None:
    """Call one action again and again."""
    asked = json.loads(sys.stdin.readline())
    call = v2.client(asked["client"])
    call(asked["action"], asked["parameters"])
    for line in sys.stdin:
        calls, began, seconds = 0, time.perf_counter(), float(line)
        while (elapsed := time.perf_counter() - began) < seconds:
            call(asked["action"], asked["parameters"])
            calls += 1
        print(calls / elapsed, flush=True)


if __name__ == "__main__":
    main()
