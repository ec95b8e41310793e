"""Why Serve cannot start what it should run, in the words of what failed."""

from __future__ import annotations

from deployments.placement import DENOISER


def messages(app_name: str) -> dict[str, str]:
    """What Serve says of each deployment that is not well; it holds the traceback of a failed constructor."""
    from ray import serve  # noqa: PLC0415 - its import warns, and the words do without

    application = serve.status().applications.get(app_name)
    deployments = {} if application is None else application.deployments
    return {name: found.message for name, found in deployments.items() if found.status != "HEALTHY" and found.message}


def reason(text: str) -> str:
    """Serve's message ends with the traceback of the replica's constructor: the last line says what went wrong."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    named = [line for line in lines if line.startswith("cluster.errors.")]
    return (named or lines or ["Serve could not deploy"])[-1].removeprefix("cluster.errors.")


def failing(app_name: str) -> tuple[str, ...]:
    """A line on replicas whose start has failed, while Serve tries again or has given up; empty while none has."""
    said = messages(app_name).get(DENOISER, "")
    return (f"replicas do not start: {reason(said)}",) if "cluster.errors." in said else ()
