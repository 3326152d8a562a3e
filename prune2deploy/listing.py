"""Every target profile, and whether it can be used on this machine.

In: the shipped profiles. Out: plain rows for programs, and a table for people; or one profile that
is usable, with its backend.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prune2deploy import target as profiles
from prune2deploy.backends import registry
from prune2deploy.backends.base import Availability, Backend
from prune2deploy.errors import MissingBackend
from prune2deploy.target import Target


def rows() -> list[dict[str, Any]]:
    """One row per profile: what it is, whether it runs here, builds here, and the fix if not."""
    found = []
    for profile in profiles.load_all():
        backend = registry.for_target(profile)
        there = backend.availability(profile)
        found.append(
            {
                "name": profile.name,
                "backend": profile.backend,
                "device": profile.device,
                "precision": profile.precision,
                "description": profile.description,
                "path": str(profile.path),
                "builds": there.usable or backend.can_build(profile).usable,
                **dataclasses.asdict(there),
            }
        )
    return found


def text(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table as a terminal shows it, and where the profiles lie that one may copy."""
    lines = []
    for row in rows:
        mark = "usable" if row["usable"] else ("can build" if row["builds"] else "not usable")
        lines.append(f"{row['name']:<16} {mark:<11} {row['description']}")
        if not row["usable"]:
            lines += [f"{'':16} because {row['reason']}", f"{'':16} fix: {row['fix']}"]
    folders = sorted({str(Path(row["path"]).parent) for row in rows})
    return "\n".join([*lines, "", *(f"files: {folder}" for folder in folders)])


def usable(name: str, *, to_run: bool = True) -> tuple[Target, Backend]:
    """Load a target and its backend.

    Args:
        name: Name or path of the profile.
        to_run: Whether engines must run here; building may need less.

    Raises:
        ConfigError: No such target, or a wrong profile.
        MissingBackend: It cannot be used here; names the fix and the targets that can.
    """
    profile = profiles.load(name)
    backend = registry.for_target(profile)
    there = _there(backend, profile, to_run=to_run)
    if there.usable:
        return profile, backend
    others = [
        other.name
        for other in profiles.load_all()
        if _there(registry.for_target(other), other, to_run=to_run).usable
    ]
    raise MissingBackend(
        f"target {profile.name} cannot be used here: {there.reason}\n  fix: {there.fix}\n"
        f"  targets that work here: {', '.join(others) or 'none'}"
    )


def _there(backend: Backend, target: Target, *, to_run: bool) -> Availability:
    return backend.availability(target) if to_run else backend.can_build(target)
