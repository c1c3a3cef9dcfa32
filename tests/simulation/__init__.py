"""A whole agent in this process, in simulated time, under faults that a seed chooses: docs/simulation.md.

Arrows point one way: stock, asking, judge, faults, record; world; clients, line, threads; outside; operator, checks; simulate.
"""
