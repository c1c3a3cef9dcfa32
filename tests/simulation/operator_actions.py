"""The actions of a simulated operator and system on a serving agent: files, signals, shortages, and its end."""

import os
from pathlib import Path
from typing import Final

import trio

from . import fixtures
from .world import World

__all__ = ["act", "end_faults", "write_files"]

_SEES_IT: Final = 12
"""Seconds in which a reload comes to its end, however long its threads take."""
_DAMAGED: Final = "this = is = no configuration"


def write_files(world: World) -> None:
    """Write the files of the start; in some worlds the audit log exists already, with a partial last line."""
    _configure(world, 0)
    _replace(world.directory / "keyring", "0")
    (world.directory / "identity").write_text("")
    if world.faults_rng.random() < 0.3:
        first = '{"request_id": "FIRST", "previous": "' + "0" * 64 + '"}\n'
        world.record.path.write_text(first + world.faults_rng.choice(("", '{"request_id": "CUT')))


def _configure(world: World, number: int) -> None:
    directory = world.directory
    text = (
        f'keyring = "{directory / "keyring"}"\nunseal = "{directory / "identity"}"\nmemory = "prefer"\n'
        f'[audit]\npath = "{world.record.path}"\non_failure = "{world.on_failure}"\n'
        f"[limits]\nconnections = {world.limits[0]}\nconnections_per_user = {world.limits[1]}\n"
        f"requests_per_second = {world.rate}\n"
    )
    for name in ("first", "second"):
        text += f'[[listener]]\nname = "{name}"\npath = "{directory / name}"\n'
    text += fixtures.toml(fixtures.CONFIGURATIONS[number]) if number >= 0 else _DAMAGED
    _replace(directory / "agent.toml", text)


def _replace(path: Path, text: str) -> None:
    # The old file stays under another name, so that its inode number is not reused in some runs only.
    new = path.with_suffix(".new")
    new.write_text(text)
    if _is_there(path):
        os.link(path, path.with_suffix(f".{len(list(path.parent.iterdir()))}"))
    new.rename(path)


def _is_there(path: Path) -> bool:
    return path.name in os.listdir(path.parent)  # Path.exists is the agent's, here


async def act(world: World) -> None:
    """Do a few things, one after the other."""
    rng = world.faults_rng
    for _ in range(rng.choice((0, 1, 2, 4))):
        await trio.sleep(rng.choice((0, 0.01, 0.3, 1)))
        if world.plan.over or world.stops:
            return
        what = rng.choice(("keyring", "keyring", "grants", "hang up", "rotate", "starve", "end a process", "wake"))
        world.add_event("operator", what)
        if what == "keyring":
            number = rng.choice((-1, *range(len(fixtures.RINGS))))
            world.on_disk = (number, world.on_disk[1])
            _replace(world.directory / "keyring", str(number))
        elif what == "grants":
            number = rng.choice((-1, *range(len(fixtures.CONFIGURATIONS))))
            world.on_disk = (world.on_disk[0], number)
            _configure(world, number)
        elif what == "hang up":
            world.send_sighup()
        elif what == "rotate":
            _rotate(world)
        elif what == "starve":
            world.starved = world.was_starved = True
            await trio.sleep(rng.choice((0.05, 0.5, 2)))
            world.starved, world.spare = False, 0
        elif what == "wake":
            world.stepwise_threads.release()
        elif lines := [line for line in world.all_connections if line.closed is None]:
            line = rng.choice(lines)
            line.client.spoiled("its process ended")
            line.end_process()


def _rotate(world: World) -> None:
    record = world.record
    if _is_there(record.path):
        to = record.path.with_suffix(f".{len(record.rotated)}")
        record.path.rename(to)
        record.rotated.append(to)
        if world.faults_rng.random() < 0.5:  # as logrotate's `create` does
            record.path.write_text("")


async def release_hangs(world: World) -> None:
    """Release hanging calls after a while."""
    while True:
        await trio.sleep(world.faults_rng.choice((0.2, 1, 5)))
        world.stepwise_threads.release()


async def end_faults(world: World) -> None:
    """End all faults, make all files good, and give the agent the time to notice."""
    world.add_event("calm")
    world.plan.over = True
    world.starved, world.spare = False, 0
    world.stepwise_threads.release()
    world.on_disk = (world.on_disk[0] % len(fixtures.RINGS), world.on_disk[1] % len(fixtures.CONFIGURATIONS))
    _replace(world.directory / "keyring", str(world.on_disk[0]))
    _configure(world, world.on_disk[1])
    await trio.sleep(2)
    for _ in range(_SEES_IT):
        seen = world.adopted[-1][1:] == world.on_disk and world.record.in_place
        if not seen and world.ended is None:
            await trio.sleep(1)
