"""The process of `keyferry-agent`, also as `python -m keyferry_agent`."""

import sys

from .clearing import clear_freed_memory


def main() -> int:
    """Run the command; the daemon in a process that overwrites what it frees."""
    if sys.argv[1:2] == ["run"]:
        clear_freed_memory()
    from .command import main as command  # noqa: PLC0415 - only now: what is imported before is imported twice

    return command()


if __name__ == "__main__":
    sys.exit(main())
