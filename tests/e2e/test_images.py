"""Images through a real router, Redis and replicas: refused by name, or brought to the engine byte by byte."""

from __future__ import annotations

import asyncio
import shutil
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from redis.asyncio import Redis

from cluster.client import EaselClient
from cluster.core import Image, ModelCard
from cluster.engines import FAKE, with_trait
from cluster.errors import EngineCannot, EngineError, InvalidRequest, QueueFull, RequestIdReused
from cluster.jobs.keys import Keys
from cluster.rpc.easel.v1 import generation_pb2_grpc as v1_grpc
from cluster.rpc.prompts import Prompt
from deployments.engine.api import EngineJob
from deployments.engine.fake import FakeEngine
from tests.e2e.conftest import CHECKPOINT, Connect, Stack, Start, until
from tests.unit.images import asked, damaged, picture

SEEING = replace(FAKE, images=True)
IMAGE, IMAGE_TOKEN = "messages[0].parts[1].image", 7
# As templates of models with vision render: a token for an image, at its place between the texts.
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|turn>' }}{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for part in m['content'] %}{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}"
    "{% endif %}{{ '<turn|>' }}{% endfor %}"
)


class SeeingEngine(FakeEngine):
    """A fake engine that takes images, and keeps what it was given."""

    def __init__(self, card: ModelCard, **values: float | None) -> None:
        super().__init__(card, **values)  # type: ignore[arg-type]  # the stack's values are those of FakeEngine
        self.given: list[EngineJob] = []

    def start(self, job: EngineJob) -> None:
        super().start(replace(job, images=()))
        self.given.append(job)


@pytest.fixture
def seeing(tmp_path: Path) -> Path:
    """The demo checkpoint, which has a vision tower, with what it lacks: a template that knows images, a processor."""
    folder = tmp_path / "tiny"
    shutil.copytree(CHECKPOINT, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "processor_config.json").write_text("{}")
    return folder


def given_to(stack: Stack, replica: str) -> list[EngineJob]:
    engine = stack.engines[replica]
    assert isinstance(engine, SeeingEngine)
    return engine.given


def files_of(job: EngineJob) -> tuple[Image, ...]:
    return tuple(Image(image.data, image.mime_type) for image in job.images)


async def kept_images(stack: Stack) -> tuple[int, int]:
    """How many jobs have images in Redis, and the bytes that Redis counts for them."""
    keys = Keys(stack.settings.state.namespace)
    async with Redis.from_url(stack.settings.state.url) as redis:
        found = [key async for key in redis.scan_iter(f"{keys.base}:images:*")]
        return len(found), int(await redis.get(f"{keys.base}:image_bytes") or 0)


async def jobs_of(client: EaselClient) -> list[str]:
    return [job.job_id async for job in client.jobs()]


async def test_an_engine_that_takes_no_images_is_named_before_anything_is_stored(start: Start) -> None:
    stack = await start(denoiser={"engine": "fake"})
    async with grpc.aio.insecure_channel(stack.addresses["router-0"]) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await v1_grpc.GenerationStub(channel).Generate(asked("look", picture()))
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert caught.value.details() == f"{IMAGE}: the engine fake takes no images; {with_trait('images')}"
    async with EaselClient(stack.addresses["router-0"]) as client:
        assert await jobs_of(client) == []
        with pytest.raises(EngineCannot, match="the engine fake"):
            await client.submit([("user", [picture(), "look"])])
        with pytest.raises(EngineCannot, match="the engine fake"):
            await anext(client.stream([("user", [picture(), "look"])]))


async def test_a_template_that_knows_no_images_is_an_invalid_request(
    start: Start, connect: Connect, seeing: Path
) -> None:
    shutil.copy(CHECKPOINT / "chat_template.jinja", seeing)
    client = connect(await start(checkpoint=seeing, traits=SEEING, engine_class=SeeingEngine))
    with pytest.raises(InvalidRequest, match="the model's chat template refuses it: it takes only texts"):
        await client.generate([("user", [picture(), "look"])])


async def test_images_reach_the_engine_in_order_and_intact(start: Start, connect: Connect, seeing: Path) -> None:
    stack = await start(checkpoint=seeing, traits=SEEING, engine_class=SeeingEngine)
    client, jpeg, webp = connect(stack), picture("JPEG"), picture("WEBP")
    (seeing / "photo.jpg").write_bytes(jpeg)
    prompt: Prompt = [("user", ["a", seeing / "photo.jpg", "b", webp])]
    answer = await client.generate(prompt, seed=1, max_new_tokens=32)
    (job,) = given_to(stack, "denoiser-0")
    assert files_of(job) == (Image(jpeg, "image/jpeg"), Image(webp, "image/webp"))
    assert job.prompt_tokens == (2, 3, ord("a"), IMAGE_TOKEN, ord("b"), IMAGE_TOKEN, 4)
    assert answer.usage.prompt_tokens == 7
    assert await kept_images(stack) == (0, 0)


async def test_a_file_that_does_not_decode_fails_its_job_and_no_other(
    start: Start, connect: Connect, seeing: Path
) -> None:
    stack = await start(checkpoint=seeing, traits=SEEING, engine_class=SeeingEngine)
    client = connect(stack)
    with pytest.raises(EngineError, match="images: image 1 of 1 does not decode"):
        await client.generate([("user", [damaged(), "look"])], max_new_tokens=32)
    assert given_to(stack, "denoiser-0") == []
    assert await kept_images(stack) == (0, 0)
    await client.generate([("user", [picture(), "look"])], max_new_tokens=32)


async def test_a_job_takes_its_images_along_when_its_replica_is_lost(
    start: Start, connect: Connect, seeing: Path
) -> None:
    stack = await start(replicas=2, checkpoint=seeing, traits=SEEING, engine_class=SeeingEngine, steps_per_canvas=20)
    client, data = connect(stack), picture("PNG", 300, 200)
    expected = await client.generate([("user", [data, "look"])], seed=3, max_new_tokens=96)
    for name in stack.engines:
        given_to(stack, name).clear()
    asking = asyncio.create_task(client.generate([("user", [data, "look"])], seed=3, max_new_tokens=96))
    await until(lambda: any(given_to(stack, name) for name in stack.engines))
    first = next(name for name in stack.engines if given_to(stack, name))
    await until(lambda: stack.engines[first].stats().canvases > 1)
    stack.engines[first]._fail_at_step = stack.engines[first].stats().denoising_steps + 1
    answer = await asking
    assert (answer.token_ids, answer.usage.attempts) == (expected.token_ids, 2)
    assert answer.replica != first
    for name in stack.engines:
        (job,) = given_to(stack, name)
        assert files_of(job) == (Image(data, "image/png"),)


async def test_an_adopting_router_needs_no_images_for_a_job_to_go_on(
    start: Start, connect: Connect, seeing: Path
) -> None:
    state = {"lease_ms": 500, "heartbeat_ms": 100}
    stack = await start(
        replicas=1, state=state, checkpoint=seeing, traits=SEEING, engine_class=SeeingEngine, steps_per_canvas=40
    )
    await stack.add_router("router-1")
    data = picture()
    submitted = await connect(stack).submit([("user", [data])], max_new_tokens=96, request_id="seen")
    await until(lambda: stack.engines["denoiser-0"].stats().canvas_steps > 3)
    await stack.crash_router("router-0")
    other = connect(stack, "router-1")
    events = [event async for event in other.watch(submitted.job_id)]
    assert events
    assert (await other.get("seen")).state == "succeeded"
    assert {files_of(job) for job in given_to(stack, "denoiser-0")} == {(Image(data, "image/png"),)}


async def test_the_same_id_with_another_image_is_refused(start: Start, connect: Connect, seeing: Path) -> None:
    client = connect(await start(checkpoint=seeing, traits=SEEING, engine_class=SeeingEngine))
    for _ in range(2):
        await client.generate([("user", [picture()])], request_id="once", max_new_tokens=32)
    with pytest.raises(RequestIdReused):
        await client.generate([("user", [picture(width_px=9)])], request_id="once", max_new_tokens=32)


async def test_images_of_waiting_jobs_are_bounded(start: Start, connect: Connect, seeing: Path) -> None:
    stack = await start(
        state={"image_limit_bytes": 64 * 2**20},
        checkpoint=seeing,
        traits=SEEING,
        engine_class=SeeingEngine,
        step_time_ms=20.0,
        steps_per_canvas=200,
    )
    client, data = connect(stack), picture()
    job = await client.submit([("user", [data])], max_new_tokens=96)
    _, used_bytes = await kept_images(stack)
    assert len(data) < used_bytes < len(data) + 40
    keys = Keys(stack.settings.state.namespace)
    async with Redis.from_url(stack.settings.state.url) as redis:
        await redis.set(f"{keys.base}:image_bytes", 64 * 2**20)
        with pytest.raises(QueueFull, match=r"take all of state\.image_limit_bytes"):
            await client.submit([("user", [data])], max_new_tokens=96, request_id="more")
        await client.submit("a text", max_new_tokens=32)
        await redis.set(f"{keys.base}:image_bytes", used_bytes)
    await client.cancel(job.job_id)
    assert await kept_images(stack) == (0, 0)
