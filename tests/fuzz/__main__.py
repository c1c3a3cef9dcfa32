"""The command: `python -m fuzz [--minutes M] [TARGET]` fuzzes (`make fuzz`); `python -m fuzz TARGET FILE...` replays."""

import argparse
import re
import subprocess
import sys
import traceback
from pathlib import Path

from .corpus import CORPUS, FOUND, ROOT, grow, kept
from .targets import TARGETS

_SECONDS_FOR_ONE = 25
_MEMORY = 2_048
_WORD = re.compile(rb"[A-Za-z][\w.:/-]{2,31}")
_PROGRESS = re.compile(r"#(\d+)\t.*cov: (\d+) ft: (\d+) corp: (\d+)/")


def main() -> int:
    """0: every promise was kept; 1: one was broken; 2: usage."""
    parser = argparse.ArgumentParser(prog="python -m fuzz")
    parser.add_argument("--minutes", type=float, default=2.0, help="how long to fuzz, all targets together")
    parser.add_argument("--grow", action="store_true", help="only take what was found into the corpora that are kept")
    parser.add_argument("target", nargs="?", choices=TARGETS, metavar="TARGET", help=", ".join(TARGETS))
    parser.add_argument("file", nargs="*", type=Path, metavar="FILE", help="replay these, without the fuzzer")
    arguments = parser.parse_args()
    targets = [arguments.target] if arguments.target else list(TARGETS)
    if arguments.file:
        return max(_replay(arguments.target, path) for path in arguments.file)
    if arguments.grow:
        for target in targets:
            dropped, taken = grow(target, TARGETS[target].run)
            print(f"{target}: {dropped} dropped, {taken} taken")
        return 0
    seconds = max(1, round(60 * arguments.minutes / len(targets)))
    return max([_fuzz(target, seconds) for target in targets])


def _replay(target: str, path: Path) -> int:
    try:
        TARGETS[target].run(path.read_bytes())
    except Exception:
        traceback.print_exc()
        print(f"{target}: {path}: a promise is broken")
        return 1
    print(f"{target}: {path}: every promise is kept")
    return 0


def _fuzz(target: str, seconds: int) -> int:
    """Fuzz one target in a process of its own, which a finding may end."""
    grown, findings, log = FOUND / target, FOUND / "findings", FOUND / f"{target}.log"
    for folder in (grown, findings):
        folder.mkdir(parents=True, exist_ok=True)
    options = [
        f"-max_total_time={seconds}",
        f"-max_len={TARGETS[target].longest}",
        f"-timeout={_SECONDS_FOR_ONE}",
        f"-rss_limit_mb={_MEMORY}",
        f"-artifact_prefix={findings}/{target}-",
        f"-dict={_dictionary(target)}",
        str(grown),  # the first folder is the one that it writes to
        str(CORPUS / target),
    ]
    with open(log, "wb") as output:
        ended = subprocess.run(
            [sys.executable, "-m", "fuzz.run_atheris", target, *options], stdout=output, stderr=output, check=False
        )
    text = log.read_text(errors="replace")
    progress = _PROGRESS.findall(text)
    executions, edges, features, inputs = progress[-1] if progress else "0000"
    print(f"{target:16}{executions:>10} executions{edges:>7} edges{features:>7} features{inputs:>6} inputs", flush=True)
    if ended.returncode == 0 and progress:
        return 0
    print("\n".join(text.splitlines()[-60:]))
    found = re.findall(r"written to (\S+)", text)
    if found:
        print(f"\nFound something. To replay it: PYTHONPATH=tests python -m fuzz {target} {_shown(found[-1])}")
    else:
        print(f"\nThe fuzzer did not run, or was ended: see {_shown(str(log))}")
    return 1


def _dictionary(target: str) -> Path:
    """The words of the corpus, for the fuzzer to put where it likes."""
    words = {word for path in kept(target) for word in _WORD.findall(path.read_bytes())}
    made = FOUND / f"{target}.dict"
    made.write_text("".join(f'"{word.decode()}"\n' for word in sorted(words)))
    return made


def _shown(path: str) -> str:
    return str(Path(path).relative_to(ROOT)) if Path(path).is_relative_to(ROOT) else path


if __name__ == "__main__":
    sys.exit(main())
