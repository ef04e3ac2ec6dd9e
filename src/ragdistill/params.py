"""Strict parameters, one section per stage, read from `params.yaml`.

An unknown key or a wrong type is an error that names the nearest valid key. Meanings and reasons stand in
`params.yaml` itself, at the end of each line; defaults live there too, so that nothing is configured twice.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from ragdistill.checks import contradictions, explain, yaml_fault
from ragdistill.errors import ConfigError

Positive = Annotated[int, msgspec.Meta(ge=1)]
NonNegative = Annotated[int, msgspec.Meta(ge=0)]
Seed = Annotated[int, msgspec.Meta(ge=0, lt=2**32)]
Share = Annotated[float, msgspec.Meta(ge=0.0, le=1.0)]
PositiveFloat = Annotated[float, msgspec.Meta(gt=0.0)]
NonNegativeFloat = Annotated[float, msgspec.Meta(ge=0.0)]


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of all sections; each says `frozen=True` again, for type checkers."""


class WebshopParams(Section, frozen=True):
    goals: Literal["synthetic", "human"]
    infeasible: Literal["exclude", "keep"]
    observation: Literal["original", "chosen"]
    attributes_page: bool
    products: Positive | None


class EnvParams(Section, frozen=True):
    name: str
    max_steps: Positive | None
    workers: Positive
    recycle_after: Positive
    step_timeout: PositiveFloat
    webshop: WebshopParams
    options: dict[str, Any]


class AgentParams(Section, frozen=True):
    name: str
    context_tokens: Positive
    max_reply_tokens: Positive | None
    loop_limit: Annotated[int, msgspec.Meta(ge=2)]
    no_action_limit: Positive
    examples: NonNegative

    @property
    def reply_tokens(self) -> int:
        """`max_reply_tokens`, which `stages.defaults` fills in where it is null."""
        assert self.max_reply_tokens, "agent.max_reply_tokens is not settled"  # noqa: S101
        return self.max_reply_tokens


class ModelParams(Section, frozen=True):
    base: str
    teacher: str | None
    engine: Literal["auto", "openvino", "batched", "reference", "scripted", "endpoint", "vllm"]
    script: str | None
    dtype: Literal["auto", "bfloat16", "float32"]
    concurrency: Positive


class PriceParams(Section, frozen=True):
    prompt: NonNegativeFloat
    cached: NonNegativeFloat
    completion: NonNegativeFloat


class EndpointParams(Section, frozen=True):
    base_url: str
    model: str
    api_key_env: Annotated[str, msgspec.Meta(pattern=r"\A[A-Z_][A-Z0-9_]*\Z")] | None
    tokenizer: str | None
    deadline: PositiveFloat
    retries: NonNegative
    max_concurrency: Positive
    prices: PriceParams
    budget: NonNegativeFloat | None
    currency: str


class TasksParams(Section, frozen=True):
    source: Literal["generated", "official"]
    train: Positive
    dev: NonNegative
    test: Positive
    eval_split: str


class LoraParams(Section, frozen=True):
    r: Positive
    alpha: Positive
    dropout: Share
    lr: PositiveFloat
    epochs: Positive
    batch: Positive
    warmup: Share
    weight_decay: NonNegativeFloat
    max_tokens: Positive


class ColdstartParams(Section, frozen=True):
    enabled: bool
    demos: Positive
    plain: Share
    hinted: Share
    irrelevant: Share
    lora: LoraParams


class RolloutsParams(Section, frozen=True):
    attempts: Positive | None
    temperature: NonNegativeFloat
    record_admissible: bool


class HintLlmParams(Section, frozen=True):
    model: str | None
    mode: Literal["single", "pairwise"]
    cases: Positive
    max_hints: Positive
    context_tokens: Positive
    max_reply_tokens: Positive
    temperature: NonNegativeFloat


class HintsParams(Section, frozen=True):
    extractor: Literal["offline", "llm"]
    kinds: tuple[Literal["contrast", "precondition", "redundancy", "affordance"], ...]
    k: NonNegative
    min_support: Positive
    max_chars: Positive
    dedup: Share
    per_bucket: Positive
    ranker: Literal["evidence", "tfidf", "embedding", "llm", "lift"]
    ranker_model: str | None
    embedder: str | None
    llm: HintLlmParams


class LiftParams(Section, frozen=True):
    hints: NonNegative
    tasks: Positive
    attempts: Positive


class TeachParams(Section, frozen=True):
    variants: tuple[Literal["hints", "retry", "random"], ...]
    tasks: Literal["all", "failures"]
    attempts: Positive
    temperature: NonNegativeFloat


class StripParams(Section, frozen=True):
    max_invalid: NonNegative | None
    min_score: Share | None
    on_hint_reference: Literal["drop_thought", "drop_trajectory"]
    per_task: Positive


class RecipeParams(Section, frozen=True):
    loss: Literal["assistant", "all"]
    format: Literal["chat", "plain"]
    too_long: Literal["drop", "cut"]
    label_smoothing: Share
    quantize: Literal["none", "nf4"]


class SftParams(Section, frozen=True):
    variants: tuple[Literal["sft", "distilled", "sft_retry", "distilled_random"], ...]
    seeds: tuple[Seed, ...]
    include_base_successes: bool
    checkpoint_steps: Positive
    recipe: RecipeParams
    lora: LoraParams


class TrainingParams(Section, frozen=True):
    launch: Literal["auto", "one", "fsdp", "deepspeed"]
    processes: Positive | None
    checkpointing: bool | Literal["auto"]
    attention: Literal["auto", "sdpa", "flash_attention_2"]
    packing: bool | Literal["auto"]


Untrained = Literal["raw", "base", "rag", "rag_random", "rag_constant"]
"""Policies that no training makes; every other one is a student."""


class EvaluateParams(Section, frozen=True):
    policies: tuple[Untrained, ...]
    temperature: NonNegativeFloat
    primary: tuple[str, ...] | None


class ReportParams(Section, frozen=True):
    bootstrap: Positive
    confidence: Share


class TrackParams(Section, frozen=True):
    uri: str | None
    experiment: str
    registered_model: str | None


class VllmParams(Section, frozen=True):
    python: str | None
    url: str | None
    args: tuple[str, ...]
    start_timeout: PositiveFloat


class PromoteParams(Section, frozen=True):
    margin: NonNegativeFloat


class RayParams(Section, frozen=True):
    address: Annotated[str, msgspec.Meta(pattern=r"\A(auto|local|[^@/\s]+:\d+)\Z")] | None
    workers: Positive | None


class Params(Section, frozen=True):
    """All of `params.yaml`."""

    seed: Seed
    label: str
    env: EnvParams
    agent: AgentParams
    model: ModelParams
    endpoint: EndpointParams
    tasks: TasksParams
    coldstart: ColdstartParams
    rollouts: RolloutsParams
    hints: HintsParams
    lift: LiftParams
    teach: TeachParams
    strip: StripParams
    sft: SftParams
    training: TrainingParams
    evaluate: EvaluateParams
    report: ReportParams
    track: TrackParams
    promote: PromoteParams
    vllm: VllmParams
    ray: RayParams


def load_params(path: Path = Path("params.yaml")) -> Params:
    """Read and check `path`; `ConfigError` names the key, and the nearest valid one if it is unknown.

    It is read as DVC reads and writes it, by YAML 1.2: to 1.1, its `5e-05` would be a text.
    """
    from ruamel.yaml import YAML, YAMLError

    try:
        raw = YAML(typ="safe").load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; run from the project's root.") from None
    except (YAMLError, ValueError, RecursionError) as e:
        raise ConfigError(f"{path} is not valid YAML: {yaml_fault(e)}.") from None
    return convert_params(raw, str(path))


def convert_params(raw: Any, where: str = "params") -> Params:
    """Turn plain data into `Params`, strictly."""
    try:
        params = msgspec.convert(raw, Params)
    except msgspec.ValidationError as e:
        raise ConfigError(f"{where}: {explain(str(e), Params)}") from None
    for what in contradictions(params):
        raise ConfigError(f"{where}: {what}")
    return params
