"""What a request asks for that this cluster's engine, or its checkpoint, cannot do. Refused by name, never ignored."""

from __future__ import annotations

from collections.abc import Iterator

from cluster.core import ModelCard
from cluster.engines import EngineTraits, with_trait
from cluster.errors import EngineCannot
from cluster.rpc.chat import image_parts
from cluster.rpc.easel.v1 import generation_pb2


def check_engine(request: generation_pb2.GenerateRequest, engine: EngineTraits, card: ModelCard) -> None:
    """Raises EngineCannot, which names each field, the engine, and the engines that can."""
    refusals = list(_refusals(request, engine, card))
    if refusals:
        raise EngineCannot("; ".join(refusals))


def _refusals(request: generation_pb2.GenerateRequest, engine: EngineTraits, card: ModelCard) -> Iterator[str]:
    image_field = next((field for field, _ in image_parts(request.messages)), None)
    if image_field is not None and not engine.images:
        yield f"{image_field}: the engine {engine.name} takes no images; {with_trait('images')}"
    elif image_field is not None and card.vision is None:
        yield f"{image_field}: the engine {engine.name} takes images, but the checkpoint {card.name} has no vision part"
    if request.drafts and not engine.drafts:
        yield f"drafts: the engine {engine.name} makes none; {with_trait('drafts')}"
    if request.sampling.HasField("seed") and not engine.seeds:
        yield f"sampling.seed: the engine {engine.name} takes no seeds; {with_trait('seeds')}"
