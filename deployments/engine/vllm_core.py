"""vLLM itself, started and ended: AsyncLLM on an event loop of its own, and the connection to the plugin."""

from __future__ import annotations

import asyncio
import secrets
import socket
import threading
import time
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from cluster.checkpoint import Checkpoint
from cluster.core import SamplingParams
from cluster.errors import ConfigError, EngineError
from deployments.engine.pixels import DecodedImage
from deployments.engine.torch_tp.link import accept_follower
from deployments.engine.torch_tp.payload import CanvasState
from deployments.engine.vllm_entry import check_plugin, check_version
from deployments.engine.vllm_wire import EXTRA, Address, EngineEnd, Ready

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

KEY_BYTES = 32
CALL_TIMEOUT_S = 30.0
CLOSE_TIMEOUT_S = 10.0
# Nothing of vLLM's is worth waiting for once its jobs are gone.
GRACE_S = 1.0
# vLLM starts before its worker connects: loading weights takes minutes for a large model.
START_TIMEOUT_S = 1800.0
CPU_BLOCK_TOKENS = 32
# As many images as a request may hold.
MAX_IMAGES = 16
# Prepared images that vLLM keeps, in this process and in its engine's; by itself it takes 4 of each.
IMAGE_CACHE_GIB = 1.0


@dataclass(frozen=True, slots=True)
class VllmSettings:
    """How vLLM runs a checkpoint on one replica.

    `executor` is vLLM's way to its ranks: "ray" on the placement group of the replica, "mp" as processes of this host,
    None as vLLM itself chooses. `batch_tokens` bounds the tokens of a forward; None takes a canvas for each slot and
    four more for prompts. `step_timeout_s` bounds the wait for one forward. Raises ConfigError.
    """

    slots: int = 8
    dtype: str = "float32"
    device: str = "auto"
    max_context_tokens: int | None = None
    prefix_reuse: bool = True
    tp: int = 1
    executor: str | None = None
    host: str = "127.0.0.1"
    quantization: str | None = None
    gpu_memory_utilization: float = 0.9
    enforce_eager: bool = False
    batch_tokens: int | None = None
    prefill_tiles_per_step: int = 4
    step_timeout_s: float = 30.0

    @property
    def run_dtype(self) -> str:
        """What a checkpoint of a canvas says it was computed in: only the same arithmetic continues it."""
        return self.dtype if self.quantization is None else f"{self.dtype} {self.quantization}"

    def forward_tokens(self, canvas_tokens: int) -> int:
        """Raises ConfigError when a forward could not hold a canvas of every slot: vLLM would cut one."""
        least = self.slots * canvas_tokens
        wanted = self.batch_tokens or least + self.prefill_tiles_per_step * canvas_tokens
        if wanted < least:
            raise ConfigError(
                f"denoiser.vllm.max_num_batched_tokens is {wanted}; {self.slots} slots of {canvas_tokens} tokens need "
                f"at least {least}"
            )
        return wanted

    def context_tokens(self, checkpoint: Checkpoint) -> int:
        """Raises ConfigError for a limit that the model does not have."""
        limit, canvas = checkpoint.card.max_context_tokens, checkpoint.card.canvas_tokens
        wanted = self.max_context_tokens or limit
        if not canvas < wanted <= limit:
            raise ConfigError(
                f"max_context_tokens is {wanted}; it must be above one canvas of {canvas} and at most "
                f"the model's {limit}"
            )
        return wanted


class VllmCore:
    """vLLM's processes. `words` is the connection to the plugin; requests are known by a key of the caller's.

    Raises EngineError when vLLM is not there, is another version, or does not start; ConfigError for settings.
    """

    def __init__(self, checkpoint: Checkpoint, settings: VllmSettings) -> None:
        self._checkpoint, self._settings = checkpoint, settings
        self._vllm = _import_vllm()
        platform = self._vllm.platforms.current_platform.device_type
        if settings.device not in ("auto", platform):
            raise ConfigError(
                f"denoiser.device is {settings.device!r}, but this vllm runs on {platform!r}; set it to auto"
            )
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vllm-loop", daemon=True)
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._llm: AsyncLLM | None = None
        self._closed = False
        listener = socket.create_server((settings.host, 0))
        address = Address(
            settings.host, listener.getsockname()[1], secrets.token_bytes(KEY_BYTES), settings.step_timeout_s
        )
        self._thread.start()
        try:
            with listener:
                self.words, self.ready = self._meet(listener, address)
        except BaseException:
            self._end_loop()
            raise
        try:
            self._check_memory()
        except ConfigError:
            self.close()
            raise

    @property
    def checkpoint(self) -> Checkpoint:
        return self._checkpoint

    @property
    def settings(self) -> VllmSettings:
        return self._settings

    @property
    def blocks(self) -> int:
        """How many blocks vLLM's cache has."""
        return int(self._running().vllm_config.cache_config.num_gpu_blocks or 0)

    @property
    def block_tokens(self) -> int:
        return int(self._running().vllm_config.cache_config.block_size)

    def lost(self) -> str | None:
        """Why vLLM cannot go on, or None; any thread may ask."""
        if self.words.lost is None and not self._closed and self._running().errored:
            self.words.fail("vllm's engine process is dead")
        return self.words.lost

    def add(
        self, key: str, tokens: list[int], plan: dict[str, Any], max_tokens: int, images: Sequence[DecodedImage] = ()
    ) -> None:
        """Hands a request to vLLM, with an image for each of the first image tokens. Raises EngineError when it is
        dead."""
        params = self._vllm.SamplingParams(
            temperature=1.0,
            max_tokens=max_tokens,
            stop_token_ids=list(self._checkpoint.card.eos_token_ids),
            detokenize=False,
            output_kind=self._vllm.sampling_params.RequestOutputKind.FINAL_ONLY,
            extra_args={EXTRA: plan},
        )
        self._call(self._begin(key, self._prompt(tokens, images), params))

    def has_ended(self, key: str) -> bool:
        """Whether vLLM is done with a request that was added."""
        return key not in self._tasks

    def abort(self, key: str) -> None:
        """Takes a request out of vLLM; one that has ended is ignored."""
        self._loop.call_soon_threadsafe(self._cancel, key)

    def close(self) -> None:
        """Ends vLLM's processes; may be called twice."""
        if self._closed:
            return
        self._closed = True
        self.words.close()
        self._end_loop()

    def _meet(self, listener: socket.socket, address: Address) -> tuple[EngineEnd, Ready]:
        """Starts vLLM, and takes the connection that its worker opens on the way."""
        found: list[socket.socket] = []
        door = threading.Thread(target=_answer, args=(listener, address.key, found), name="vllm-door", daemon=True)
        door.start()
        try:
            self._llm = self._call(self._start(address), START_TIMEOUT_S)
        except (ValueError, RuntimeError, OSError, self._vllm.v1.engine.exceptions.EngineDeadError) as error:
            raise EngineError(f"vllm did not start: {_one_line(error)}") from error
        door.join(CALL_TIMEOUT_S)
        if not found:
            raise EngineError("vllm started without easel's plugin: its worker did not report")
        words = EngineEnd(found[0], self._settings.step_timeout_s)
        ready = words.next(CALL_TIMEOUT_S)
        if not isinstance(ready, Ready):
            raise EngineError("vllm's worker said nothing after it had started")
        return words, ready

    async def _start(self, address: Address) -> AsyncLLM:
        from vllm.engine.arg_utils import AsyncEngineArgs  # noqa: PLC0415 - heavy, and may not be there
        from vllm.v1.engine.async_llm import AsyncLLM  # noqa: PLC0415

        settings, canvas_tokens = self._settings, self._checkpoint.card.canvas_tokens
        sees = self._checkpoint.card.vision is not None
        arguments = AsyncEngineArgs(
            model=str(self._checkpoint.path),
            # What prepares images is made with the tokenizer.
            skip_tokenizer_init=not sees,
            limit_mm_per_prompt={"image": MAX_IMAGES if sees else 0, "video": 0},
            mm_processor_cache_gb=IMAGE_CACHE_GIB,
            dtype=settings.dtype,
            quantization=settings.quantization,
            max_model_len=settings.context_tokens(self._checkpoint),
            max_num_seqs=settings.slots,
            max_num_batched_tokens=settings.forward_tokens(canvas_tokens),
            # A prompt's part in a forward: with more, a long prompt could leave another job half a canvas.
            long_prefill_token_threshold=canvas_tokens,
            enable_chunked_prefill=True,
            # As vLLM has it on GPUs: an image begins a part of its own.
            disable_chunked_mm_input=True,
            enable_prefix_caching=settings.prefix_reuse,
            block_size=self._block_tokens(canvas_tokens),
            gpu_memory_utilization=settings.gpu_memory_utilization,
            enforce_eager=settings.enforce_eager,
            tensor_parallel_size=settings.tp,
            distributed_executor_backend=settings.executor,
            additional_config=address,
            disable_log_stats=True,
            enable_log_requests=False,
        )
        return AsyncLLM.from_engine_args(arguments)

    def _block_tokens(self, canvas_tokens: int) -> int | None:
        """On CPU vLLM shares prefixes in blocks of 128 tokens, longer than most prompts of small models; its kernels
        there want multiples of 32. On GPUs its own choice is good."""
        on_cpu = self._vllm.platforms.current_platform.device_type == "cpu"
        return canvas_tokens if on_cpu and canvas_tokens % CPU_BLOCK_TOKENS == 0 else None

    def forget_prefixes(self) -> bool:
        """Empties vLLM's prefix cache; False while something still uses it."""
        return bool(self._call(self._running().reset_prefix_cache()))

    def _check_memory(self) -> None:
        """vLLM would take a canvas from a job for which it finds no memory; so every slot must have all it may need."""
        config = self._running().vllm_config
        fits = config.cache_config.kv_cache_max_concurrency
        if fits is not None and fits < self._settings.slots:
            raise ConfigError(
                f"denoiser.max_context_tokens is {config.model_config.max_model_len}; the memory that vllm has left "
                f"holds {fits:.1f} contexts of that length, and denoiser.slots asks for {self._settings.slots}"
            )

    def _running(self) -> AsyncLLM:
        assert self._llm is not None
        return self._llm

    def _prompt(self, tokens: list[int], images: Sequence[DecodedImage]) -> Any:  # noqa: ANN401
        """vLLM scales images down in a thread of its own; meanwhile other requests go on."""
        if not images:
            return self._vllm.inputs.tokens_input(tokens)
        return {"prompt_token_ids": tokens, "multi_modal_data": {"image": [image.pixels for image in images]}}

    async def _begin(self, key: str, prompt: Any, params: Any) -> None:  # noqa: ANN401
        self._tasks[key] = asyncio.get_running_loop().create_task(self._follow(key, prompt, params), name=key)

    async def _follow(self, key: str, prompt: Any, params: Any) -> None:  # noqa: ANN401
        try:
            async for _ in self._running().generate(prompt, params, request_id=key):
                pass
        except asyncio.CancelledError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever vLLM raises for one request, the engine cannot go on
            self.words.fail(f"vllm gave up on a job: {_one_line(error)}")
        finally:
            self._tasks.pop(key, None)

    def _cancel(self, key: str) -> None:
        task = self._tasks.get(key)
        if task is not None:
            task.cancel()

    def _call(self, work: Coroutine[Any, Any, Any], timeout_s: float = CALL_TIMEOUT_S) -> Any:  # noqa: ANN401
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result(timeout_s)
        except TimeoutError:
            future.cancel()
            raise EngineError(f"vllm did not answer within {timeout_s:g} s") from None

    async def _shut_down(self) -> None:
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._llm is not None:
            self._llm.shutdown(timeout=GRACE_S)
            self._llm = None

    def _end_loop(self) -> None:
        with suppress(EngineError):
            self._call(self._shut_down(), 3 * CLOSE_TIMEOUT_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(CLOSE_TIMEOUT_S)
        if not self._thread.is_alive():
            self._loop.close()


def request_plan(
    key: str,
    sampling: SamplingParams,
    eos: tuple[int, ...],
    *,
    canvas_index: int,
    canvases: int,
    state: CanvasState | None,
) -> dict[str, Any]:
    """What the plugin must know of a request, in types that vLLM's messages carry."""
    saved = None
    if state is not None:
        saved = {
            "tokens": state.tokens.tobytes(),
            "argmax": state.argmax.tobytes(),
            "soft": state.soft.tobytes(),
            "step": state.step,
            "unchanged_steps": state.unchanged_steps,
        }
    return {
        "key": key,
        "sampling": asdict(sampling),
        "eos": list(eos),
        "canvas_index": canvas_index,
        "canvases": canvases,
        "state": saved,
    }


def _import_vllm() -> Any:  # noqa: ANN401 - vLLM has no types here
    try:
        import vllm  # noqa: PLC0415
        import vllm.envs  # noqa: PLC0415
        import vllm.inputs  # noqa: PLC0415
        import vllm.platforms  # noqa: PLC0415
        import vllm.v1.engine.exceptions  # noqa: PLC0415
    except ImportError as error:
        raise EngineError(f"the vllm engine needs `pip install easel[vllm]`: {_one_line(error)}") from None
    check_version(vllm.__version__)
    check_plugin(vllm.envs.VLLM_PLUGINS)
    return vllm


def _answer(listener: socket.socket, key: bytes, found: list[socket.socket]) -> None:
    """Waits for the worker; strangers are turned away."""
    end_s = time.monotonic() + START_TIMEOUT_S
    with suppress(OSError):  # the listener is closed when vLLM does not start
        while not found and time.monotonic() < end_s:
            follower = accept_follower(listener, key, START_TIMEOUT_S)
            found += [follower[1]] if follower else []


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:400]
