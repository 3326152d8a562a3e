"""Positions of a dimension ↔ channels of the axes that it is made of. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from prune2deploy.errors import PruneError

Channels = npt.NDArray[np.int64]
Cover = Sequence[tuple[str, Channels]]
"""Per axis of a dimension: its name, and the channel of every position (-1: none)."""


def whole_channels(idxs: Channels, channel: Channels) -> Channels:
    """Channels all of whose positions are among ``idxs``."""
    size = int(channel.max(initial=-1)) + 1
    there = np.bincount(channel[channel >= 0], minlength=size)
    hit = channel[idxs]
    found = np.bincount(hit[hit >= 0], minlength=size)
    return np.flatnonzero((found == there) & (there > 0))


def run_length(channel: Channels) -> int:
    """Length of the shortest run of positions of one channel: above one for outer factors."""
    starts = np.flatnonzero(np.diff(channel, prepend=-2) != 0)
    lengths = np.diff(starts, append=len(channel))[channel[starts] >= 0]
    return int(lengths.min()) if len(lengths) else 1


def to_channels(
    idxs: Sequence[int], cover: Cover, reasons: Mapping[str, str | None]
) -> dict[str, Channels]:
    """Channels to remove so that every position of ``idxs`` goes.

    A channel all of whose positions are listed goes as such. A position that is left takes the
    channel of the innermost prunable axis there with it: one column of one head stands for that
    column of every head.

    Args:
        idxs: Positions of one dimension.
        cover: The axes of the dimension.
        reasons: Why each axis has to keep its channels; ``None`` where it may lose some.

    Raises:
        PruneError: a position is out of range, or no prunable axis covers it.
    """
    size = len(cover[0][1])
    chosen = np.unique(np.asarray(idxs, dtype=np.int64))
    if len(chosen) and not (chosen[0] >= 0 and chosen[-1] < size):
        raise PruneError(f"indices must be in 0..{size - 1}, found {chosen[[0, -1]].tolist()}")
    free = sorted(
        ((name, channel) for name, channel in cover if reasons[name] is None),
        key=lambda entry: run_length(entry[1]),
    )
    gone: dict[str, set[int]] = {}
    left = np.zeros(size, dtype=bool)
    left[chosen] = True
    for name, channel in free:
        whole = whole_channels(chosen, channel)
        if len(whole) and left[np.isin(channel, whole)].any():
            gone.setdefault(name, set()).update(whole.tolist())
            left[np.isin(channel, whole)] = False
    for place in np.flatnonzero(left).tolist():
        name, number = _innermost(place, free, cover, reasons)
        gone.setdefault(name, set()).add(number)
    return {name: np.array(sorted(channels)) for name, channels in gone.items()}


def _innermost(
    place: int, free: Cover, cover: Cover, reasons: Mapping[str, str | None]
) -> tuple[str, int]:
    """The prunable axis of the shortest runs at a position, and its channel there."""
    for name, channel in free:
        if channel[place] >= 0:
            return name, int(channel[place])
    why = [reasons[n] for n, c in cover if c[place] >= 0 and reasons[n] is not None]
    raise PruneError(
        f"channel {place} has to stay: {why[0] if why else 'nothing holds it'}. "
        "Leave it out of the indices, or choose another layer"
    )


def to_positions(channels: Channels, channel: Channels) -> Channels:
    """Positions of the given channels; in channel order where each has one position."""
    size = int(channel.max(initial=-1)) + 1
    wanted = np.zeros(size + 1, dtype=bool)  # the last entry answers for position -1
    wanted[channels] = True
    wanted[-1] = False
    places = np.flatnonzero(wanted[channel])
    if len(places) <= len(channels):
        places = places[np.argsort(channel[places], kind="stable")]
    return places


def merged(cover: Cover) -> list[tuple[str, Channels]]:
    """Each axis once, where a dimension holds one in several places."""
    found: dict[str, Channels] = {}
    for name, channel in cover:
        known = found.get(name)
        found[name] = channel if known is None else np.where(known >= 0, known, channel)
    return list(found.items())
