"""The benchmark: `make bench`. Everything is measured beside the bare loop, on the same core, in the same run.

    __main__.py             the command
    figures.py              percentiles, ratios, medians and spreads of samples
    table.py                figures as a table for a terminal, and for docs/performance.md
    plots.py                curves as pictures
    check.py                compares ratios with those of an earlier run
    cpu.py                  assigns processes to cores, and measures the time that other programs took there
    baselines.py            everything that is timed inside one process: the bare loop, the module, gmssl
    worker.py               a process on a core of its own that runs the baselines
    agent_under_test.py     the agent in its full configuration
    load.py                 load generators: requests are encoded in advance, answers are counted and not decoded
    canned_server.py        a server that computes nothing
    run_context.py          the rounds of all measurements, and the bare loop beside each
    measure/                a module for each part of the table
    peers/                  other programs that do the same job

`docs/performance.md` explains how to read the table.
"""
