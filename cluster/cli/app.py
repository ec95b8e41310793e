"""All commands of `easel`, put together."""

from __future__ import annotations

import click

from cluster import __version__
from cluster.cli.chaos import chaos
from cluster.cli.config import config
from cluster.cli.connection import trust_options
from cluster.cli.demo import demo
from cluster.cli.drain import drain
from cluster.cli.failure import ReportingGroup
from cluster.cli.generate import generate
from cluster.cli.jobs import cancel, get, jobs, submit, watch
from cluster.cli.keys import keys
from cluster.cli.local import down, up
from cluster.cli.metrics import metrics
from cluster.cli.status import status

HELP = """Serve block-diffusion language models, and use them.

\b
Start here:
  easel up                          start a cluster on this machine
  easel generate 'count 31 to 34'   watch an answer being denoised
  easel status                      see replicas, slots and the queue
  easel down                        stop the cluster

Commands that talk to a cluster find it by --address host:port (or several, with commas between), else by the
environment variable EASEL_ADDRESS, else they take the one that runs on this machine, else localhost:8500. Where it
asks for a credential, EASEL_API_KEY holds it.

\b
Exit codes: 0 done, 2 the command or the request is wrong, 3 no cluster answers
or it has no room, 4 the job failed, was cancelled or missed its deadline,
130 interrupted, 1 anything else.
"""


@click.group(
    cls=ReportingGroup, help=HELP, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(__version__, prog_name="easel", message="%(prog)s %(version)s")
@trust_options
def easel(**trust: object) -> None:
    """See HELP."""
    del trust  # cluster.cli.connection.open_client takes them from the context


for _command in (
    up,
    down,
    status,
    metrics,
    drain,
    generate,
    submit,
    get,
    watch,
    cancel,
    jobs,
    keys,
    config,
    demo,
    chaos,
):
    easel.add_command(_command)
