"""The benchmark: `make bench`. Everything is measured beside the bare loop, on the same core, in the same run.

    __main__.py     the command
    figures.py      figures: percentiles, ratios, medians and spreads
    table.py        figures as a table for a terminal, and for docs/performance.md
    plots.py        curves as pictures
    limits.py       what a figure must not fall below: the targets, and the check against an earlier run
    cores.py        who runs where, and whether anybody else ran there too
    loops.py        everything that is timed inside one process: the bare loop, the module, gmssl
    worker.py       a process on a core of its own that runs those loops
    subject.py      the agent in its full configuration
    load.py         load generators: bytes made beforehand, answers counted and not read
    stub.py         a server that computes nothing
    session.py      what all measurements share: cores, rounds, the bare loop beside each
    measure/        what is measured: a module for each part of the table
    peers/          other programs that do the same job

`docs/performance.md` explains how to read the results.
"""
