"""The whole configuration: one dataclass per node, the single source of names, types and ranges.

Hydra merges the YAML files of `conf/` into these dataclasses, so a misspelt key or a wrong type fails while
composing. OmegaConf checks types only, so a range is in the field's metadata (`at_least`, `at_most`,
`multiple_of`), and `checks.py` checks it. Composing ends in one `Config` for the rest of the library: plain
dataclasses, enums and lists, without interpolations. Nothing here imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

from omegaconf import MISSING

if TYPE_CHECKING:
    Settings = dict[str, Any]
else:
    # While composing, the value is the dataclass that `plugins.settings_schema` makes of a strategy.
    Settings = Any


def ranged(
    default: Any = MISSING,
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    multiple_of: int | None = None,
    items: tuple[int, int] | None = None,
) -> Any:
    """A field whose value must lie in [at_least, at_most] and be a multiple of `multiple_of`.

    In a list this holds for each value, and `items` is the smallest and the largest number of values. The upper
    limits are far above published sizes, and only refuse typing errors that would make a plan take hours. Within
    all limits a plan takes about a second.
    """
    limits = {"at_least": at_least, "at_most": at_most, "multiple_of": multiple_of, "items": items}
    return field(default=default, metadata={k: v for k, v in limits.items() if v is not None})


def matching(pattern: str, example: str) -> Any:
    """A list of texts that each match `pattern`, such as `example`."""
    return field(default=MISSING, metadata={"matching": (pattern, example)})


def one_of(*choices: str) -> Any:
    """A string field with a closed list of values."""
    return field(default=MISSING, metadata={"one_of": choices})


# The largest clip that is planned: pixels of a side, and frames.
MOST_PIXELS, MOST_FRAMES = 16384, 100_001

# NVIDIA's names for the strength of the edges or the blur that are made from a clip.
STRENGTHS = ("very_low", "low", "medium", "high", "very_high")


class JobName(Enum):
    generate = "generate"
    plan = "plan"
    verify = "verify"
    rehearse = "rehearse"


class TaskName(Enum):
    t2v = "t2v"
    i2v = "i2v"
    v2v = "v2v"
    t2i = "t2i"
    flf2v = "flf2v"
    policy = "policy"
    forward_dynamics = "forward_dynamics"
    inverse_dynamics = "inverse_dynamics"
    transfer = "transfer"


class Dtype(Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"


class Keep(Enum):
    first = "first"
    last = "last"


class Device(Enum):
    cpu = "cpu"
    cuda = "cuda"


class Placement(Enum):
    resident = "resident"
    sharded = "sharded"
    streamed = "streamed"
    auto = "auto"


class Encoder(Enum):
    """H.264 encoders by libav's names: x264, and the hardware encoder of an NVIDIA GPU."""

    libx264 = "libx264"
    h264_nvenc = "h264_nvenc"


class CacheName(Enum):
    none = "none"
    seacache = "seacache"


class RehearsalFormat(Enum):
    table = "table"
    markdown = "markdown"


class HiddenAct(Enum):
    silu = "silu"
    relu2 = "relu2"


@dataclass
class JobConfig:
    name: JobName = MISSING


@dataclass
class TransformerConfig:
    """The dimensions of `diffusers.Cosmos3OmniTransformer` that cost, checks and the toy model need."""

    hidden_size: int = ranged(at_least=1, at_most=65536)
    num_hidden_layers: int = ranged(at_least=1, at_most=1024)
    num_attention_heads: int = ranged(at_least=1, at_most=1024)
    num_key_value_heads: int = ranged(at_least=1, at_most=1024)
    head_dim: int = ranged(at_least=2, at_most=1024, multiple_of=2)
    intermediate_size: int = ranged(at_least=1, at_most=262144)
    vocab_size: int = ranged(at_least=1, at_most=10_000_000)
    hidden_act: HiddenAct = MISSING
    qk_norm_for_text: bool = MISSING
    use_und_k_norm_for_gen: bool = MISSING
    rms_norm_eps: float = ranged(at_least=1e-12, at_most=1)
    latent_patch_size: int = ranged(at_least=1, at_most=16)
    rope_theta: float = ranged(at_least=1, at_most=1e12)
    sound_gen: bool = MISSING
    sound_dim: int | None = ranged(at_least=1, at_most=65536)
    sound_latent_fps: float = ranged(at_least=1, at_most=1000)
    action_gen: bool = MISSING
    action_dim: int = ranged(at_least=1, at_most=65536)
    num_embodiment_domains: int = ranged(at_least=1, at_most=65536)


@dataclass
class VaeModelConfig:
    """The values of `diffusers.AutoencoderKLWan` that decide its program, named as diffusers names them."""

    base_dim: int = ranged(at_least=1, at_most=4096)
    decoder_base_dim: int = ranged(at_least=1, at_most=4096)
    z_dim: int = ranged(at_least=1, at_most=4096)
    dim_mult: list[int] = ranged(at_least=1, at_most=64, items=(1, 8))
    num_res_blocks: int = ranged(at_least=1, at_most=64)
    attn_scales: list[float] = ranged(at_least=0, at_most=64, items=(0, 8))
    temperal_downsample: list[bool] = ranged(items=(0, 7))
    is_residual: bool = MISSING
    in_channels: int = ranged(at_least=1, at_most=4096)
    out_channels: int = ranged(at_least=1, at_most=4096)
    patch_size: int = ranged(at_least=1, at_most=16)
    scale_factor_temporal: int = ranged(at_least=1, at_most=64)
    scale_factor_spatial: int = ranged(at_least=1, at_most=256)


@dataclass
class SoundTokenizerConfig:
    """The only value of `diffusers.Cosmos3AVAEAudioTokenizer` that is not fixed: the width of its decoder."""

    dec_dim: int = ranged(at_least=1, at_most=65536)


@dataclass
class ScheduleConfig:
    """The noise levels of the checkpoint's own sampler, named as diffusers' `UniPCMultistepScheduler` names them.

    `native_grid` is `Sampler.native_grid`. A plan needs these values to know the timesteps of a run.
    """

    use_karras_sigmas: bool = MISSING
    flow_shift: float = ranged(at_least=0.01, at_most=1000)
    sigma_min: float | None = ranged(at_least=1e-6, at_most=1e6)
    sigma_max: float | None = ranged(at_least=1e-6, at_most=1e6)
    native_grid: bool = MISSING


@dataclass
class Recommendation:
    """The defaults of `task` and `sampler` for one modality."""

    height: int = ranged(at_least=16, at_most=MOST_PIXELS)
    width: int = ranged(at_least=16, at_most=MOST_PIXELS)
    num_frames: int = ranged(at_least=1, at_most=MOST_FRAMES)
    steps: int = ranged(at_least=1, at_most=1000)
    guidance_scale: float = ranged(at_least=0, at_most=100)
    flow_shift: float | None = ranged(at_least=0.01, at_most=1000)


@dataclass
class ActionRecommendation(Recommendation):
    """The defaults of tasks with actions. A plan without a picture takes `height` and `width` for its size."""

    chunk_size: int = ranged(at_least=1, at_most=10_000)
    resolution_tier: int = ranged(at_least=1, at_most=MOST_PIXELS)


@dataclass
class TransferRecommendation(Recommendation):
    """The defaults of a transfer. `fps` is the rate of the control clips that the model was trained with."""

    fps: float = ranged(at_least=1, at_most=120)


@dataclass
class Recommended:
    prompt: str = MISSING
    system_prompt: bool | None = MISSING
    fps: float = ranged(at_least=1, at_most=120)
    video: Recommendation = field(default_factory=Recommendation)
    image: Recommendation = field(default_factory=Recommendation)
    action: ActionRecommendation = field(default_factory=ActionRecommendation)
    transfer: TransferRecommendation = field(default_factory=TransferRecommendation)
    transfer_wsm: TransferRecommendation = field(default_factory=TransferRecommendation)


@dataclass
class Tier:
    """The sizes of one resolution, such as 1280x720, and how many frames a clip may have at these sizes."""

    sizes: list[str] = matching(r"[1-9]\d{1,4}x[1-9]\d{1,4}", "1280x720")
    min_frames: int = ranged(at_least=1, at_most=MOST_FRAMES)
    max_frames: int = ranged(at_least=1, at_most=MOST_FRAMES)


@dataclass
class TrainedConfig:
    """The clips that the model was trained for. `when_outside` says what happens to any other clip."""

    when_outside: str = one_of("warn", "refuse", "ignore")
    tasks: list[TaskName] = MISSING
    controls: list[str] = MISSING
    fps: list[float] = ranged(at_least=1, at_most=1000)
    tiers: list[Tier] = MISSING
    words: list[str] | None = MISSING


@dataclass
class LoraConfig:
    """An adapter that is added to the transformer's weights, multiplied by `weight`.

    `sha256` is the checksum of the adapter's file. A run fills it in, or refuses another file if it is set.
    """

    path: str = MISSING
    weight: float = ranged(1.0, at_least=-1000, at_most=1000)
    sha256: str | None = None


@dataclass
class ModelConfig:
    name: str = MISSING
    repo: str | None = MISSING
    path: str | None = MISSING
    revision: str | None = None
    commit: str | None = None
    lora: list[LoraConfig] = field(default_factory=list)
    dtype: Dtype = MISSING
    vae_dtype: Dtype = MISSING
    distilled_sigmas: list[float] | None = ranged(None, at_least=0, at_most=1, items=(1, 1000))
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    transformer: TransformerConfig = field(default_factory=TransformerConfig)
    vae: VaeModelConfig = field(default_factory=VaeModelConfig)
    sound_tokenizer: SoundTokenizerConfig = field(default_factory=SoundTokenizerConfig)
    recommended: Recommended = field(default_factory=Recommended)
    trained: TrainedConfig = field(default_factory=TrainedConfig)


@dataclass
class ControlsConfig:
    """Control clips, which say what each frame shows, by diffusers' names. Each is a file, or `from_video`."""

    edge: str | None = MISSING
    blur: str | None = MISSING
    depth: str | None = MISSING
    seg: str | None = MISSING
    wsm: str | None = MISSING


@dataclass
class TaskConfig:
    """The task and its inputs. The keys from `controls` on are read by transfer only; other tasks have None there.

    `num_frames` None means as many frames as the first control clip has.
    """

    name: TaskName = MISSING
    # a string, not an enum: `${model.recommended.${task.modality}...}` builds a key from it
    modality: str = one_of("video", "image", "action", "transfer", "transfer_wsm")
    prompt: str = MISSING
    prompt_file: str | None = MISSING
    negative_prompt: str | None = MISSING
    system_prompt: bool | None = MISSING
    image: str | None = MISSING
    last_image: str | None = MISSING
    video: str | None = MISSING
    condition_latent_frames: list[int] = ranged(at_least=-1, at_most=MOST_FRAMES)
    condition_keep: Keep = MISSING
    background: list[int] = MISSING
    resample: bool = MISSING
    height: int = ranged(at_least=16, at_most=MOST_PIXELS)
    width: int = ranged(at_least=16, at_most=MOST_PIXELS)
    num_frames: int | None = ranged(at_least=1, at_most=MOST_FRAMES)
    fps: float = ranged(at_least=1, at_most=120)
    sound: bool = MISSING
    domain: str | None = MISSING
    actions: str | None = MISSING
    chunk_size: int | None = ranged(at_least=1, at_most=10_000)
    view_point: str | None = MISSING
    resolution_tier: int | None = ranged(at_least=1, at_most=MOST_PIXELS)
    canvas: list[int] | None = ranged(at_least=16, at_most=MOST_PIXELS, items=(2, 2))
    controls: ControlsConfig = field(default_factory=ControlsConfig)
    edge_threshold: str | None = one_of(*STRENGTHS)
    blur_strength: str | None = one_of(*STRENGTHS)
    control_guidance: float | None = ranged(at_least=0, at_most=100)
    control_guidance_interval: list[float] | None = None
    num_video_frames_per_chunk: int | None = ranged(at_least=2, at_most=MOST_FRAMES)
    num_conditional_frames: int | None = ranged(at_least=0, at_most=MOST_FRAMES)
    num_first_chunk_conditional_frames: int | None = ranged(at_least=0, at_most=MOST_FRAMES)


@dataclass
class VaeConfig:
    """`encode` and `decode` hold a strategy's class (`_target_`) and its settings, whose keys are the plugin's."""

    parallel_encode: bool = MISSING
    parallel_decode: bool = MISSING
    required_exactness: str = one_of("bitwise", "rounding", "approximate")
    kernels: str = one_of("own", "diffusers")
    encode: Settings = MISSING
    decode: Settings = MISSING


@dataclass
class AcceleratorConfig:
    """The device of one rank, as a plan knows it. On cpu the ranks of a node share it."""

    name: str = MISSING
    memory_gb: float = ranged(at_least=0.001, at_most=1e6)
    bf16_tflops: float = ranged(at_least=0.000001, at_most=1e6)
    fp32_tflops: float = ranged(at_least=0.000001, at_most=1e6)
    memory_gb_per_s: float = ranged(at_least=0.001, at_most=1e6)
    link_gb_per_s: float = ranged(at_least=0.001, at_most=1e6)
    network_gb_per_s: float = ranged(at_least=0.001, at_most=1e6)
    host_gb_per_s: float = ranged(at_least=0.001, at_most=1e6)
    latency_us: float = ranged(at_least=0, at_most=1e9)
    launch_us: float = ranged(at_least=0, at_most=1e9)
    overhead_s: float = ranged(at_least=0, at_most=1e6)
    transformer_efficiency: float = ranged(at_least=0.001, at_most=1)
    vae_efficiency: float = ranged(at_least=0.001, at_most=1)


@dataclass
class TopologyConfig:
    nodes: int = ranged(at_least=1, at_most=4096)
    ranks_per_node: int = ranged(at_least=1, at_most=1024)
    dp: int = ranged(at_least=1, at_most=1024)
    cfg: int = ranged(at_least=1, at_most=3)
    cp: list[int] = ranged(at_least=1, at_most=1024, items=(2, 2))
    ulysses: int = ranged(at_least=1, at_most=1024)
    threads_per_rank: int = ranged(at_least=1, at_most=1024)
    patience_seconds: float = ranged(300.0, at_least=1, at_most=1e7)
    device: Device = MISSING
    accelerator: AcceleratorConfig = field(default_factory=AcceleratorConfig)


@dataclass
class WeightsConfig:
    """The placement of the transformer's layers.

    `resident_layers` of streamed layers stay on the device; None means as many as fit.
    """

    placement: Placement = MISSING
    resident_layers: int | None = ranged(at_least=0, at_most=1024)
    keep_text: bool = MISSING


@dataclass
class PlanConfig:
    search: bool = MISSING


@dataclass
class VerifyConfig:
    """Read by job=verify.

    `strategies` None means the strategies whose VAE flags are on. `latents` None means to denoise first.
    """

    strategies: list[str] | None = None
    latents: str | None = None


@dataclass
class RehearseConfig:
    """Read by job=rehearse. `ranks` None: all ranks of a replica with up to eight, else one rank of each kind."""

    ranks: list[int] | None = ranged(None, at_least=0, at_most=1023)
    format: RehearsalFormat = RehearsalFormat.table


@dataclass
class CacheConfig:
    """The settings of the cache that spares passes, see `denoise.cache`. The names are `SeaCacheConfig`'s."""

    name: CacheName = CacheName.none
    threshold: float = ranged(0.25, at_least=0.000001, at_most=1e6)
    residual_order: int = ranged(1, at_least=0, at_most=1)
    retention_steps: int = ranged(1, at_least=0, at_most=1000)
    cache_end_steps: int = ranged(1, at_least=0, at_most=1000)
    max_consecutive_cached: int = ranged(2, at_least=0, at_most=1000)
    power_exp: float = ranged(3.0, at_least=0.001, at_most=100)


@dataclass
class SamplerConfig:
    steps: int = ranged(at_least=1, at_most=1000)
    guidance_scale: float = ranged(at_least=0, at_most=100)
    guidance_interval: list[float] | None = None
    flow_shift: float | None = ranged(at_least=0.01, at_most=1000)
    seed: int = ranged(at_least=0, at_most=2**63 - 1)
    cache: CacheConfig = field(default_factory=CacheConfig)


@dataclass
class OutputConfig:
    latents: bool = MISSING
    sound: bool = MISSING
    report: bool = MISSING
    against_replicated: bool = MISSING
    control: bool = MISSING
    crf: int = ranged(at_least=0, at_most=51)
    preset: str = MISSING
    encoder: Encoder = MISSING
    encoders: int | None = ranged(at_least=1, at_most=64)


@dataclass
class SweepConfig:
    """Read by a sweep (`-m`). The pictures of all jobs are compared with those of the job `baseline`.

    `resume` is the folder of an earlier sweep of the same jobs; jobs that are done there are not run again. Every
    job runs `repeats` times: all jobs once, then all jobs again. `repeat` counts the runs of a job from 0.
    """

    baseline: int = ranged(at_least=0, at_most=1_000_000)
    resume: str | None = None
    repeats: int = ranged(at_least=1, at_most=1000)
    repeat: int = ranged(0, at_least=0, at_most=1000)


@dataclass
class Config:
    job: JobConfig = field(default_factory=JobConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    vae: VaeConfig = field(default_factory=VaeConfig)
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    topology: TopologyConfig = field(default_factory=TopologyConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    verify: VerifyConfig = field(default_factory=VerifyConfig)
    rehearse: RehearseConfig = field(default_factory=RehearseConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)
    # keys that the user adds, such as tags; they are saved with the run, and nothing reads them
    extras: dict[str, Any] = field(default_factory=dict)
    # a name or a list of names, for which OmegaConf has no type
    objective: Any = None
