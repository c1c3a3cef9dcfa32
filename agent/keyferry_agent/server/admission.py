"""Admission of connections. Limits the connections in all, of one user, and of all callers without a grant.

A user is a uid, and one person can have 65,536 of them (subordinate uids). So callers without a grant share one small pool,
and their connections are closed first when a limit is reached.
"""

import os
from collections import Counter
from collections.abc import Callable
from typing import Final

from ..authz.caller import Caller
from ..state import ServerState

__all__ = ["Admission", "NoRoomError", "Place"]

_UNGRANTED: Final = 64
"""Connections of all callers without a grant together. Half of the limit of all connections applies if it is less."""
_ROOT: Final = 0


class NoRoomError(Exception):
    """A limit of connections is reached. The message names the limit."""


class Place:
    """The place of one connection among all. `close` is called once if another connection needs the place."""

    __slots__ = ("caller", "close", "granted", "is_operator")

    def __init__(self, caller: Caller, *, operator: bool, close: Callable[[], None]) -> None:
        self.caller = caller
        self.is_operator = operator
        self.close = close
        self.granted = True

    @property
    def user(self) -> int | None:
        """The uid of the connection's caller."""
        return self.caller.peer.uid


class Admission:
    """The places of all connections of an agent."""

    def __init__(self, agent: ServerState) -> None:
        self._agent = agent
        self._policy = agent.policy
        self._places: dict[Place, None] = {}
        """All places, in the order in which their connections came."""
        self._ungranted: dict[Place, None] = {}
        self._per_user: Counter[int | None] = Counter()

    def enter(self, caller: Caller, *, seen: bool, close: Callable[[], None]) -> Place:
        """Return a place for a connection, if need be by closing one of a caller without a grant. Raises `NoRoomError`.

        `seen`: whether the agent sees the caller's process. In this pid namespace, root and the agent's own user are operators
        and probes. Their connections are never closed for another.
        """
        self._follow_policy()
        limits = self._agent.settings.limits
        user = caller.peer.uid
        if self._per_user[user] >= limits.connections_per_user:
            raise NoRoomError("This user has all the connections one user may have")
        place = Place(caller, operator=seen and user in (_ROOT, os.geteuid()), close=close)
        place.granted = self._is_granted(place)
        pool = max(1, min(_UNGRANTED, limits.connections // 2))
        is_full = len(self._places) >= limits.connections
        if (is_full or (not place.granted and len(self._ungranted) >= pool)) and not self._make_room():
            raise NoRoomError("This agent has all the connections it may have")
        self._places[place] = None
        self._per_user[user] += 1
        if not place.granted:
            self._ungranted[place] = None
        self._count()
        return place

    def leave(self, place: Place) -> None:
        """Release a place. Does nothing if the place was taken for another connection."""
        if place not in self._places:
            return
        del self._places[place]
        self._ungranted.pop(place, None)
        self._per_user[place.user] -= 1
        if not self._per_user[place.user]:
            del self._per_user[place.user]
        self._count()

    def judge(self, place: Place) -> None:
        """Check again whether the caller has a grant. Call when new evidence about its program has come."""
        if place not in self._places:
            return
        place.granted = self._is_granted(place)
        if place.granted:
            self._ungranted.pop(place, None)
        else:
            self._ungranted.setdefault(place)

    def _is_granted(self, place: Place) -> bool:
        policy, caller = self._agent.policy, place.caller
        caller.refresh(policy)
        # A user named in a grant on a program counts as granted until the program is inspected, which takes a while.
        is_expected = bool(caller.granted.asks) and place.user in policy.users_by_program
        return place.is_operator or is_expected or bool(caller.granted.grants)

    def _follow_policy(self) -> None:
        if self._policy is not self._agent.policy:
            self._policy = self._agent.policy
            for place in self._places:
                self.judge(place)

    def _make_room(self) -> bool:
        """Close the oldest connection without a grant, of the user with most such connections. Return False if none exists."""
        if not self._ungranted:
            return False
        per_user = Counter(place.user for place in self._ungranted)
        max_count = max(per_user.values())
        place = next(place for place in self._ungranted if per_user[place.user] == max_count)
        self.leave(place)
        place.close()
        return True

    def _count(self) -> None:
        self._agent.counters.socket_connections = len(self._places)
