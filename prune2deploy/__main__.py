"""``python -m prune2deploy`` and the ``prune2deploy`` command."""

from __future__ import annotations

import sys

from prune2deploy.cli import end_on_sigterm, run


def main() -> None:
    """Run the command line and leave with its exit code."""
    end_on_sigterm()
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
