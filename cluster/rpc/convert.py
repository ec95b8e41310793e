"""Between protobuf messages and domain types. Pure functions; what they get is checked already."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from google.protobuf.timestamp_pb2 import Timestamp

from cluster.core import (
    Canvas,
    Draft,
    FinishReason,
    Image,
    JobSpec,
    Priority,
    ReplicaRow,
    SamplingParams,
    Usage,
)
from cluster.rpc.easel.internal.v1 import denoiser_pb2
from cluster.rpc.easel.v1 import cluster_pb2, generation_pb2, jobs_pb2


def job_spec_to_proto(spec: JobSpec) -> denoiser_pb2.JobSpec:
    """The form in which Redis keeps a job and a replica gets it."""
    sampling = spec.sampling
    return denoiser_pb2.JobSpec(
        job_id=spec.job_id,
        prompt_tokens=spec.prompt_tokens,
        sampling=denoiser_pb2.Sampling(
            seed=sampling.seed,
            max_new_tokens=sampling.max_new_tokens,
            max_denoising_steps=sampling.max_denoising_steps,
            entropy_bound=sampling.entropy_bound,
            t_min=sampling.t_min,
            t_max=sampling.t_max,
            confidence_threshold=sampling.confidence_threshold,
            stability_threshold=sampling.stability_threshold,
        ),
        stop=spec.stop,
        priority=int(spec.priority),
        tenant=spec.tenant,
        drafts=spec.wants_drafts,
        image_count=spec.image_count,
        traceparent=spec.traceparent,
    )


def job_spec_from_proto(message: denoiser_pb2.JobSpec) -> JobSpec:
    """The inverse of `job_spec_to_proto`. Raises ValueError for a priority this version does not know."""
    sampling = message.sampling
    return JobSpec(
        job_id=message.job_id,
        prompt_tokens=tuple(message.prompt_tokens),
        sampling=SamplingParams(
            seed=sampling.seed,
            max_new_tokens=sampling.max_new_tokens,
            max_denoising_steps=sampling.max_denoising_steps,
            entropy_bound=sampling.entropy_bound,
            t_min=sampling.t_min,
            t_max=sampling.t_max,
            confidence_threshold=sampling.confidence_threshold,
            stability_threshold=sampling.stability_threshold,
        ),
        stop=tuple(message.stop),
        priority=Priority(message.priority),
        tenant=message.tenant,
        wants_drafts=message.drafts,
        image_count=message.image_count,
        traceparent=message.traceparent,
    )


def images_to_bytes(images: Sequence[Image]) -> bytes:
    """The form in which Redis keeps a job's images; empty for none."""
    kept = (denoiser_pb2.Image(data=image.data, mime_type=image.mime_type) for image in images)
    return denoiser_pb2.JobImages(images=kept).SerializeToString()


def images_from_bytes(kept: bytes) -> tuple[Image, ...]:
    """The inverse of `images_to_bytes`."""
    return tuple(Image(image.data, image.mime_type) for image in denoiser_pb2.JobImages.FromString(kept).images)


def canvas_to_proto(canvas: Canvas) -> denoiser_pb2.CommittedCanvas:
    """The form in which Redis keeps a canvas."""
    return denoiser_pb2.CommittedCanvas(
        canvas_index=canvas.index,
        raw_tokens=canvas.raw_tokens,
        tokens=canvas.tokens,
        text=canvas.text,
        denoising_steps=canvas.denoising_steps,
        mean_entropy=canvas.mean_entropy,
    )


def canvas_from_proto(message: denoiser_pb2.CommittedCanvas) -> Canvas:
    """The inverse of `canvas_to_proto`."""
    return Canvas(
        index=message.canvas_index,
        raw_tokens=tuple(message.raw_tokens),
        tokens=tuple(message.tokens),
        text=message.text,
        denoising_steps=message.denoising_steps,
        mean_entropy=message.mean_entropy,
    )


def draft_to_proto(draft: Draft) -> denoiser_pb2.DraftCanvas:
    """A draft on its way from replica to router."""
    return denoiser_pb2.DraftCanvas(
        canvas_index=draft.canvas_index,
        step=draft.step,
        text=draft.text,
        mean_entropy=draft.mean_entropy,
        accepted_tokens=draft.accepted_tokens,
    )


def draft_from_proto(message: denoiser_pb2.DraftCanvas) -> Draft:
    """The inverse of `draft_to_proto`."""
    return Draft(
        canvas_index=message.canvas_index,
        step=message.step,
        text=message.text,
        mean_entropy=message.mean_entropy,
        accepted_tokens=message.accepted_tokens,
    )


def usage_to_proto(usage: Usage) -> generation_pb2.Usage:
    """Usage for a caller."""
    return generation_pb2.Usage(
        prompt_tokens=usage.prompt_tokens,
        generated_tokens=usage.generated_tokens,
        canvases=usage.canvases,
        denoising_steps=usage.denoising_steps,
        attempts=usage.attempts,
        preemptions=usage.preemptions,
        queue_ms=usage.queue_ms,
        run_ms=usage.run_ms,
    )


def usage_from_proto(message: generation_pb2.Usage) -> Usage:
    """The inverse of `usage_to_proto`."""
    return Usage(
        prompt_tokens=message.prompt_tokens,
        generated_tokens=message.generated_tokens,
        canvases=message.canvases,
        denoising_steps=message.denoising_steps,
        attempts=message.attempts,
        preemptions=message.preemptions,
        queue_ms=message.queue_ms,
        run_ms=message.run_ms,
    )


def finish_reason_to_proto(reason: FinishReason | None) -> generation_pb2.FinishReason.ValueType:
    """FINISH_REASON_UNSPECIFIED for None: the job has not succeeded."""
    if reason is None:
        return generation_pb2.FINISH_REASON_UNSPECIFIED
    return generation_pb2.FinishReason.Value(f"FINISH_REASON_{reason.value.upper()}")


def finish_reason_from_proto(value: generation_pb2.FinishReason.ValueType) -> FinishReason | None:
    """The inverse of `finish_reason_to_proto`. Raises ValueError for a value this version does not know."""
    if value == generation_pb2.FINISH_REASON_UNSPECIFIED:
        return None
    return FinishReason(generation_pb2.FinishReason.Name(value).removeprefix("FINISH_REASON_").lower())


def priority_to_proto(priority: Priority) -> generation_pb2.Priority.ValueType:
    """The same number: cluster.core.Priority takes its values from the contract."""
    return generation_pb2.Priority.Value(f"PRIORITY_{priority.name}")


def priority_from_proto(value: generation_pb2.Priority.ValueType) -> Priority:
    """NORMAL for PRIORITY_UNSPECIFIED. Raises ValueError for a value this version does not know."""
    return Priority(value or Priority.NORMAL)


def job_state_to_proto(word: str) -> jobs_pb2.JobState.ValueType:
    """JOB_STATE_QUEUED for "queued" (or "QUEUED"). Raises ValueError for a word that is no state."""
    return jobs_pb2.JobState.Value(f"JOB_STATE_{word.upper()}")


def job_state_from_proto(value: jobs_pb2.JobState.ValueType) -> str | None:
    """The lower-case word of a state, None if unspecified. Raises ValueError for an unknown value."""
    if value == jobs_pb2.JOB_STATE_UNSPECIFIED:
        return None
    return jobs_pb2.JobState.Name(value).removeprefix("JOB_STATE_").lower()


def replica_to_proto(row: ReplicaRow) -> cluster_pb2.ReplicaStatus:
    """A replica for Cluster.GetStatus."""
    return cluster_pb2.ReplicaStatus(
        replica=row.replica,
        address=row.address,
        model=row.model,
        model_version=row.version,
        slots=row.slots,
        active=row.active,
        lease_ms=row.lease_ms,
        stats=row.stats,
        draining=row.draining,
    )


def replica_from_proto(message: cluster_pb2.ReplicaStatus) -> ReplicaRow:
    """The inverse of `replica_to_proto`."""
    return ReplicaRow(
        replica=message.replica,
        address=message.address,
        model=message.model,
        version=message.model_version,
        slots=message.slots,
        active=message.active,
        lease_ms=message.lease_ms,
        stats=dict(message.stats),
        draining=message.draining,
    )


def timestamp_to_proto(unix_ms: int) -> Timestamp:
    """A moment in milliseconds since 1970 UTC, the unit in which Redis keeps time."""
    seconds, millis = divmod(unix_ms, 1000)
    return Timestamp(seconds=seconds, nanos=millis * 1_000_000)


def timestamp_from_proto(message: Timestamp) -> datetime:
    """A moment as an aware datetime in UTC."""
    return message.ToDatetime(tzinfo=UTC)


def accepted_event(
    job_id: str, prompt_tokens: int, model: str, seed: int, *, joined: bool
) -> generation_pb2.GenerateEvent:
    """The event that opens a stream."""
    accepted = generation_pb2.Accepted(
        job_id=job_id, prompt_tokens=prompt_tokens, model=model, seed=seed, joined=joined
    )
    return generation_pb2.GenerateEvent(accepted=accepted)


def draft_event(draft: Draft, replica: str) -> generation_pb2.GenerateEvent:
    """The event of one denoising step."""
    message = generation_pb2.Draft(
        canvas_index=draft.canvas_index,
        step=draft.step,
        text=draft.text,
        mean_entropy=draft.mean_entropy,
        accepted_tokens=draft.accepted_tokens,
        replica=replica,
    )
    return generation_pb2.GenerateEvent(draft=message)


def committed_event(canvas: Canvas) -> generation_pb2.GenerateEvent:
    """The event of a canvas that is stored."""
    message = generation_pb2.Committed(
        canvas_index=canvas.index,
        text=canvas.text,
        token_ids=canvas.tokens,
        denoising_steps=canvas.denoising_steps,
        mean_entropy=canvas.mean_entropy,
    )
    return generation_pb2.GenerateEvent(committed=message)


def finished_event(reason: FinishReason, usage: Usage, replica: str) -> generation_pb2.GenerateEvent:
    """The event that closes a stream that succeeded."""
    finished = generation_pb2.Finished(
        finish_reason=finish_reason_to_proto(reason), usage=usage_to_proto(usage), replica=replica
    )
    return generation_pb2.GenerateEvent(finished=finished)
