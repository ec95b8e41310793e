"""`python -m benchmarks.chaos`: the same as `easel chaos`, with the same options. The last line is one JSON object."""

from __future__ import annotations

import sys

from cluster.cli.app import easel


def main() -> None:
    """Kill parts of a local cluster while it works; exits like `easel chaos`."""
    easel(["chaos", *sys.argv[1:]], prog_name="easel")


if __name__ == "__main__":
    main()
