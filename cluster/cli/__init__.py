"""The `easel` command: a local cluster, and jobs on any cluster, from a terminal."""


def main() -> None:
    """Entry point of the `easel` script; exits the process."""
    # Imported late: commands are named like their modules, and this package's names are its modules.
    from cluster.cli.app import easel  # noqa: PLC0415

    easel(prog_name="easel")
