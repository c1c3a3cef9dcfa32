"""One target under the fuzzer: `python -m fuzz.run_atheris TARGET [its options and folders]`. It ends its process itself."""

import sys

import atheris

_INSTRUMENTED = ["keyferry", "keyferry_agent", "tomllib"]


def main(name: str, options: list[str]) -> None:
    """Fuzz until the limit of an option, or a finding."""
    with atheris.instrument_imports(include=_INSTRUMENTED):  # modules imported in this block report their branches
        from .targets import TARGETS  # noqa: PLC0415
    atheris.Setup([sys.argv[0], *options], TARGETS[name].run)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
