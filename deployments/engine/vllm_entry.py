"""Where vLLM finds Easel's plugin (entry point group `vllm.general_plugins`), and the one version that it fits.

The plugin (vllm_plugin.py) builds on parts of vLLM that are not its public interface (docs/adr/0018), so the version is
compared before anything of it is used.
"""

from __future__ import annotations

from importlib.metadata import entry_points

from cluster.checkpoint import ARCHITECTURE
from cluster.errors import EngineError

VLLM_VERSION = "0.32.0"
PLUGIN_GROUP = "vllm.general_plugins"
PLUGIN = "easel"
MODEL = "deployments.engine.vllm_plugin:EaselDiffusionGemma"


def check_version(found: str) -> None:
    """Raises EngineError, naming both, unless `found` is the vLLM that the plugin was written for."""
    # A build may carry a local part, as in 0.32.0+cpu.
    if found.partition("+")[0] != VLLM_VERSION:
        raise EngineError(f"the vllm engine needs vllm {VLLM_VERSION}, this is {found}: pip install easel[vllm]")


def check_plugin(allowed: list[str] | None) -> None:
    """Raises EngineError when vLLM's processes would not load the plugin; `allowed` is vLLM's own VLLM_PLUGINS."""
    if PLUGIN not in entry_points(group=PLUGIN_GROUP).names:
        raise EngineError(
            "easel's plugin for vllm is not registered: install the package, a copy of its files is not enough"
        )
    if allowed is not None and PLUGIN not in allowed:
        raise EngineError(f"VLLM_PLUGINS is {','.join(allowed)!r}; the vllm engine needs {PLUGIN!r} in it")


def register() -> None:
    """Called by vLLM in each of its processes; the plugin does nothing unless the engine is one of Easel's."""
    import vllm  # noqa: PLC0415 - only vLLM calls this
    from vllm import ModelRegistry  # noqa: PLC0415

    if vllm.__version__.partition("+")[0] == VLLM_VERSION:
        ModelRegistry.register_model(ARCHITECTURE, MODEL)
