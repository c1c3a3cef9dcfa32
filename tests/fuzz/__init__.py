"""Fuzzing: each reader of other programs' data, with arbitrary input. docs/fuzzing.md has the results.

    targets/        the targets: a function for each reader, which takes bytes and raises when a promise is broken
    corpus/         for each target, inputs that reach different parts of it, and every input that ever broke a promise
    corpus.py       reads the corpora, and adds to them
    seeds.py        the first inputs of each corpus
    memory_bound.py the promise about memory
    run_atheris.py  one target under a coverage-guided fuzzer, in a process of its own
    __main__.py     the command: `make fuzz`, and how a finding is replayed

`tests/test_fuzz.py` replays the corpora and varies them for a few seconds, without the fuzzer: in `make test`.
"""
