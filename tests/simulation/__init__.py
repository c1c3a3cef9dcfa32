"""A whole agent in this process, in simulated time, under faults that a seed chooses: docs/simulation.md.

What a room may know of the others goes one way: stock, asking -> faults, record, world -> line -> clients, threads -> outside -> operator ->
checks -> simulate.
"""
