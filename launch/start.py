"""The command `tubeworks`: a Ctrl-C while the command line is being imported is answered as any other."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command line; leaves the process with the exit code."""
    try:
        from launch.cli import main as run

        run()
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(130)


if __name__ == "__main__":
    main()
