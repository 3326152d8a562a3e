"""Every target profile, and whether it can be used on this machine.

In: the shipped profiles. Out: plain rows for programs, and a table for people.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from prune2deploy import target as profiles
from prune2deploy.backends import registry


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
    """The table as a terminal shows it."""
    lines = []
    for row in rows:
        mark = "usable" if row["usable"] else ("can build" if row["builds"] else "not usable")
        lines.append(f"{row['name']:<16} {mark:<11} {row['description']}")
        if not row["usable"]:
            lines += [f"{'':16} because {row['reason']}", f"{'':16} fix: {row['fix']}"]
    return "\n".join(lines)
