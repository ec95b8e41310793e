"""What an engine or a checkpoint cannot do is refused by name."""

from __future__ import annotations

from dataclasses import replace

import grpc
import pytest

from cluster.cli.failure import exit_code, spoken_field
from cluster.core import VisionCard
from cluster.engines import FAKE, TORCH, EngineTraits, with_trait
from cluster.errors import EngineCannot
from cluster.rpc.capabilities import check_engine
from cluster.rpc.easel.v1 import generation_pb2 as v1
from cluster.rpc.status import status_of
from tests.unit.fake_router import CARD
from tests.unit.images import asked, picture

SEES = replace(FAKE, name="sees", images=True)
SEEING = replace(CARD, vision=VisionCard(3, 50))


def refusal(request: v1.GenerateRequest, engine: EngineTraits) -> str:
    with pytest.raises(EngineCannot) as caught:
        check_engine(request, engine, SEEING)
    return str(caught.value)


@pytest.mark.parametrize("engine", [FAKE, TORCH])
def test_an_image_names_the_engine_that_takes_none_and_those_that_do(engine: EngineTraits) -> None:
    said = refusal(asked("look", picture()), engine)
    others = with_trait("images")
    assert said == f"messages[0].parts[1].image: the engine {engine.name} takes no images; {others}"


def test_an_image_names_the_checkpoint_that_has_no_vision_part() -> None:
    check_engine(asked(picture()), SEES, SEEING)
    with pytest.raises(EngineCannot, match="takes images, but the checkpoint characters has no vision part"):
        check_engine(asked(picture()), SEES, CARD)


def test_a_request_without_images_needs_no_vision() -> None:
    check_engine(asked("a", "b"), TORCH, CARD)


def test_drafts_and_seeds_are_refused_where_the_engine_has_none() -> None:
    plain = replace(FAKE, name="plain", drafts=False, seeds=False)
    request = v1.GenerateRequest(text="a", drafts=True, sampling=v1.SamplingParams(seed=0))
    assert refusal(request, plain) == (
        f"drafts: the engine plain makes none; {with_trait('drafts')}; "
        f"sampling.seed: the engine plain takes no seeds; {with_trait('seeds')}"
    )
    check_engine(v1.GenerateRequest(text="a"), plain, SEEING)


def test_the_refusal_is_a_failed_precondition_with_its_own_reason() -> None:
    status = status_of(EngineCannot("the engine torch takes no images"))
    assert status.code == grpc.StatusCode.FAILED_PRECONDITION.value[0]
    assert b"ENGINE_CANNOT" in status.details[0].value
    assert exit_code(EngineCannot("x")) == 2


def test_the_command_names_an_image_as_its_option() -> None:
    assert spoken_field("messages[0].parts[1].image.data") == "--image[1]"
    assert spoken_field("request.messages[0].parts[0].image") == "--image[0]"
