"""Domain types that every part of Easel shares. Plain frozen data: no I/O, no clock, no protobuf."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum, StrEnum

MAX_SEED = 2**64 - 1


class Priority(IntEnum):
    """Urgency of a job; a larger value is served first. The numbers are those of easel.v1.Priority."""

    BATCH = 1
    NORMAL = 2
    HIGH = 3
    URGENT = 4


class FinishReason(StrEnum):
    """Why a job that succeeded stopped writing."""

    EOS = "eos"
    LENGTH = "length"
    STOP = "stop"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one job is denoised; every value is resolved, nothing is left to a default.

    `max_denoising_steps` is the cap per canvas, and the temperature schedule is stretched over it: at a step with n
    of N steps remaining the temperature is t_min + (t_max - t_min) * n / N (DiffusionGemma's linear schedule).
    `entropy_bound` is in nats, as is `confidence_threshold` (mean entropy of a canvas position).
    """

    seed: int
    max_new_tokens: int
    max_denoising_steps: int
    entropy_bound: float
    t_min: float
    t_max: float
    confidence_threshold: float
    stability_threshold: int


@dataclass(frozen=True, slots=True)
class Image:
    """A picture that came with a chat: `data` is the file as it came, `mime_type` what its content is."""

    data: bytes
    mime_type: str


# What one turn of a chat says: a text, or texts and images in the order in which they are read.
Content = str | tuple[str | Image, ...]
Turn = tuple[str, Content]


@dataclass(frozen=True, slots=True)
class VisionCard:
    """How a checkpoint takes images: each is one `image_token_id` in the prompt, where its chat template puts it.

    The engine puts the image's own positions there, at most `tokens_per_image` of them with what frames them.
    """

    image_token_id: int
    tokens_per_image: int


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What the control plane must know of a checkpoint to check a request before any compute.

    `version` is a digest of the configuration and of the weight files' headers, sizes and samples of their data: two
    replicas with the same version hold the same model. `defaults` come from generation_config.json, with seed 0.
    `vision` is None for a checkpoint without a vision part.
    """

    name: str
    version: str
    vocab_size: int
    canvas_tokens: int
    max_context_tokens: int
    bos_token_id: int | None
    pad_token_id: int
    eos_token_ids: tuple[int, ...]
    defaults: SamplingParams
    vision: VisionCard | None = None

    def canvases_for(self, max_new_tokens: int) -> int:
        """How many canvases hold `max_new_tokens` tokens: the last one may be used in part."""
        return -(-max_new_tokens // self.canvas_tokens)

    def context_tokens(self, prompt_tokens: int, images: int) -> int:
        """Most positions that a prompt with so many images takes."""
        return prompt_tokens + images * (self.vision.tokens_per_image - 1 if self.vision else 0)


@dataclass(frozen=True, slots=True)
class JobSpec:
    """One job, resolved: what a replica needs to compute it, and nothing that changes while it runs.

    `wants_drafts` tells whichever router has charge of the job to ask its replica for drafts. `image_count` is how many
    images came with it; Redis keeps them beside the spec, and a replica fetches them when it runs the job.
    `traceparent` is the span under which it was submitted, "" where nobody traces it.
    """

    job_id: str
    prompt_tokens: tuple[int, ...]
    sampling: SamplingParams
    stop: tuple[str, ...] = ()
    priority: Priority = Priority.NORMAL
    tenant: str = ""
    wants_drafts: bool = False
    image_count: int = 0
    traceparent: str = ""


@dataclass(frozen=True, slots=True)
class Canvas:
    """A committed canvas. `tokens` are the answer's own: cut after the end of the answer, without EOS and padding.

    `text` is what this canvas adds to the answer's text; it can be empty while a character or a possible stop string
    is still incomplete. `raw_tokens` are all `canvas_tokens` tokens as denoised: the context of the next canvas.
    """

    index: int
    raw_tokens: tuple[int, ...]
    tokens: tuple[int, ...]
    text: str
    denoising_steps: int
    mean_entropy: float


@dataclass(frozen=True, slots=True)
class Draft:
    """The canvas in progress after one denoising step, for people who watch; never final."""

    canvas_index: int
    step: int
    text: str
    mean_entropy: float
    accepted_tokens: int


@dataclass(frozen=True, slots=True)
class Usage:
    """What a job took. `run_ms` counts from its first assignment, `queue_ms` up to it."""

    prompt_tokens: int = 0
    generated_tokens: int = 0
    canvases: int = 0
    denoising_steps: int = 0
    attempts: int = 0
    preemptions: int = 0
    queue_ms: int = 0
    run_ms: int = 0


@dataclass(frozen=True, slots=True)
class Violation:
    """One bad field of a request: its path, and what is wrong with the value and what is allowed."""

    field: str
    description: str


@dataclass(frozen=True, slots=True)
class Placement:
    """Where Redis assigned a job: the replica's address, the fencing token of this assignment, and the owner router."""

    job_id: str
    replica: str
    address: str
    epoch: int
    committed_canvases: int
    router: str


@dataclass(frozen=True, slots=True)
class ReplicaRow:
    """A Denoiser replica as Redis knows it. `lease_ms` is what is left of its lease, never below 0.

    A replica that is `draining` gets no more jobs and gives back those it has.
    """

    replica: str
    address: str
    model: str
    version: str
    slots: int
    active: int
    lease_ms: int
    stats: dict[str, float] = field(default_factory=dict)
    draining: bool = False
