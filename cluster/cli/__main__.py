"""`python -m cluster.cli`: the `easel` command where its script is not installed."""

from cluster.cli import main

if __name__ == "__main__":
    main()
