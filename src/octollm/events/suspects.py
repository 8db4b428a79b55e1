"""Events that may have ended the process of their consumer: how they are recorded, and kept apart. No I/O.

A handler that ends its process leaves no failure behind, so nothing would count its attempts. When a partition is
claimed from a consumer that ended without giving it up, its next events are handed over in careful mode: each is
recorded as being in hand first. One that was in hand when its consumer ended is a suspect. It is in hand alone from
then on, so that an event beside it is not counted with it. Consumers over HTTP are treated alike, by their leases.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import msgspec

CAREFUL_EVENTS = 32
"""Events of a partition that are handed over in careful mode. It need not reach the event that did it: the position is
saved with each, so the next claim begins closer to it."""
ENDED_REASON = "its consumer ended without answer"
LEAST_DEATHS = 2
"""Deaths before an event is given up, also with one attempt: at the first it may not have been in hand alone."""


def encode_suspects(deaths: Mapping[int, int], in_hand: Collection[int], fence: int) -> str:
    """Return the suspects of a partition as stored: deaths by position, and the fence under which each is in hand."""
    return msgspec.json.encode({seq: (count, fence if seq in in_hand else 0) for seq, count in deaths.items()}).decode()


def claim_suspects(stored: str | None, fence: int, *, ended: bool) -> dict[int, int] | None:
    """Return the deaths of a claimed partition's suspects; ``None`` when it needs no careful mode.

    ``fence`` is that of the claim before, and ``ended`` whether its consumer ended without giving the partition up.
    """
    entries = msgspec.json.decode(stored or "{}", type=dict[int, tuple[int, int]])
    # One that was in hand under an earlier fence was not at this death.
    found = {seq: deaths + (ended and held_under == fence) for seq, (deaths, held_under) in entries.items()}
    return found if ended or found else None


def settle_suspects(stored: str, answered: Collection[int], position: int) -> str | None:
    """Return the suspects of a partition after events were answered; ``None`` when careful mode ends.

    An entry that is neither in hand nor was at a death says up to where careful mode goes.
    """
    entries = msgspec.json.decode(stored, type=dict[int, tuple[int, int]])
    left = {seq: entry for seq, entry in entries.items() if seq not in answered and (seq > position or any(entry))}
    return msgspec.json.encode(left).decode() if left else None


class Isolation:
    """Lets a suspect be in hand only while no other event of a careful partition is. One for each process."""

    def __init__(self) -> None:
        self._others = 0
        self._suspect = False

    def enter(self, *, suspect: bool) -> bool:
        """Take an event in hand; return whether that is allowed now."""
        if self._suspect or (suspect and self._others):
            return False
        if suspect:
            self._suspect = True
        else:
            self._others += 1
        return True

    def leave(self, *, suspect: bool) -> None:
        """End what :meth:`enter` began."""
        if suspect:
            self._suspect = False
        else:
            self._others -= 1
