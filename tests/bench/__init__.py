"""The benchmark: `make bench`. Everything is measured beside the bare loop, on the same core, in the same run.

    __main__.py          the command
    figures.py           figures: percentiles, ratios, medians and spreads, and their targets
    table.py             figures as a table for a terminal, and for docs/performance.md
    plots.py             curves as pictures
    check.py             the check against an earlier run
    cpu.py               the cores of agent and clients, and interference of other processes
    baselines.py         loops that are timed inside one process: the bare loop, the module, gmssl
    worker.py            a process on a core of its own that runs those loops
    agent_under_test.py  the agent in its full configuration
    load.py              load generators: requests are encoded beforehand, answers are counted and not decoded
    canned_server.py     a server that computes nothing
    run_context.py       the context of all measurements: cores, rounds, the bare loop beside each
    measure/             the measurements: a module for each part of the table
    peers/               other programs that do the same job

`docs/performance.md` explains how to read the results.
"""
