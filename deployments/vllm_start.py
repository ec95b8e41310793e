"""From the settings of a replica to its vllm engine: where vLLM's ranks run, and who reaches whom."""

from __future__ import annotations

import ray

from cluster.config import Settings
from deployments.engine.api import Engine

LOOPBACK = "127.0.0.1"
# A hanging forward is an error of the engine's before the watchdog gives the step up, which leaves a thread behind.
ENGINE_SHARE_OF_STEP = 0.75


def vllm_engine(settings: Settings) -> Engine:
    """Starts vLLM for the replica that asks. Raises CheckpointError, ConfigError or EngineError.

    One rank runs in vLLM's engine process, a child of the replica that sees the replica's GPU. Several are Ray actors
    in the bundles of the replica's placement group; on a CPU, which vLLM
    does not reach through Ray, they are processes.
    """
    from deployments.engine.vllm_engine import load_engine  # noqa: PLC0415 - only who asks for an engine imports it

    denoiser = settings.denoiser
    executor = None
    if denoiser.tp > 1:
        executor = "ray" if denoiser.num_gpus and ray.util.get_current_placement_group() else "mp"
    elsewhere = executor == "ray" and denoiser.placement != "strict_pack"
    return load_engine(
        settings.checkpoint,
        slots=denoiser.slots,
        dtype=denoiser.dtype,
        device=denoiser.device,
        max_context_tokens=denoiser.max_context_tokens,
        prefix_reuse=denoiser.prefix_reuse,
        prefill_tiles_per_step=denoiser.prefill_tiles_per_step,
        tp=denoiser.tp,
        executor=executor,
        host=ray.util.get_node_ip_address() if elsewhere else LOOPBACK,
        quantization=denoiser.vllm.quantization,
        gpu_memory_utilization=denoiser.vllm.gpu_memory_utilization,
        enforce_eager=denoiser.vllm.enforce_eager,
        batch_tokens=denoiser.vllm.max_num_batched_tokens,
        step_timeout_s=denoiser.step_timeout_s * ENGINE_SHARE_OF_STEP,
    )
