"""The command `polybus`, also `python -m polybus`."""

from __future__ import annotations

import signal
import sys

from polybus import _native


def main() -> None:
    """Run it with the arguments of this process, and exit."""
    # The core listens to signals itself; Python would only look at them when the command has ended.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.exit(_native.cli(["polybus", *sys.argv[1:]]))


if __name__ == "__main__":
    main()
