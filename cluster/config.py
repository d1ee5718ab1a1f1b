"""The configuration of a deployment: one strict model for the command line, a YAML file and a RayService's arguments."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from tailserve.cluster.autoscaling import AutoscalingConfig
from tailserve.cluster.early_stop import EarlyStopConfig
from tailserve.cluster.tenants import TenantConfig
from tailserve.engine.errors import ConfigError
from tailserve.engine.types import SloClass


def _check_speculation(value: object) -> object:
    # YAML's bare `off` is false.
    if value is False:
        return "off"
    if value in ("auto", "off") or (isinstance(value, int) and value is not True and 0 <= value <= 32):
        return value
    raise ValueError(f"{value!r} is no number of draft tokens: use auto, off, or 1 to 32 draft tokens (0: off)")


NEEDS_MODEL = (
    "speculative_prefix needs a draft model that can read a prompt by itself, which {} cannot: "
    "name one in draft_model, or set it to 0"
)

LogFormat = Literal["text", "json"]
Logged = Literal["none", "missed", "all"]

Speculation = Annotated[
    Literal["auto", "off"] | int,
    BeforeValidator(_check_speculation, json_schema_input_type=Literal["auto", "off", False] | int),
]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SloClassConfig(_Strict):
    """One service-level class."""

    name: str = Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_-]+$")
    priority: int = Field(description="lower is more urgent")
    ttft_s: float = Field(gt=0, description="target for the time to first token, seconds")
    tpot_s: float = Field(gt=0, description="target for the time per output token, seconds")
    max_tokens: int = Field(default=4096, ge=1, description="most output tokens of one request")
    max_queued: int = Field(default=1024, ge=0, description="requests that may wait for a first slot before 429")
    min_instances: int = Field(default=0, ge=0, description="kept while requests of the class come; see autoscaling")
    admission: Literal["wait", "reject"] = Field(
        default="wait", description="of a request whose first token would come too late: wait all the same, or 429"
    )
    speculation: Speculation | None = Field(default=None, description="default: that of the whole deployment")
    early_stop: EarlyStopConfig = Field(default=EarlyStopConfig(), description="ends answers that have nothing more to say")
    speculative_prefix: int = Field(
        default=0,
        ge=0,
        le=64,
        description="first tokens of an answer that a draft model writes alone: sooner, but not the verifier's; responses "
        "say how many. 0: none",
    )

    @model_validator(mode="after")
    def _check_early_stop(self) -> SloClassConfig:
        if self.speculative_prefix and self.early_stop.complete_above is not None:
            raise ValueError("speculative_prefix and early_stop.complete_above exclude each other: a draft does not say how "
                             "likely the end was; leave one of them out")  # fmt: skip
        return self

    def to_engine(self, speculation: Speculation) -> SloClass:
        """`speculation`: of the deployment."""
        return SloClass(
            **(
                self.model_dump(exclude={"early_stop", "min_instances"})
                | {"speculation": speculation if self.speculation is None else self.speculation}
            )
        )


class Resources(_Strict):
    """What each process asks of Ray. CPUs are Ray's logical ones: they decide placement, not speed."""

    ingress_cpus: float = Field(default=0.25, ge=0)
    router_cpus: float = Field(default=0.25, ge=0)
    verifier_cpus: float = Field(default=1.0, ge=0, description="of each rank")
    verifier_gpus: float = Field(default=0, ge=0, description="of each rank, set aside by Ray; device says where it runs")
    draft_cpus: float = Field(default=0.25, ge=0)
    draft_gpus: float = Field(default=0, ge=0)
    placement: Literal["STRICT_PACK", "PACK"] = Field(
        default="STRICT_PACK",
        description="an instance's processes share a node; or, with PACK, as few as have room for them, which must all have"
        " the models at the same paths",
    )


class Timeouts(_Strict):
    """Seconds."""

    step_s: float = Field(default=60.0, gt=0, description="a verifier that takes longer for a step is restarted")
    load_s: float = Field(default=1800.0, gt=0, description="a model process that takes longer to load is given up")
    draft_s: float = Field(default=0.05, ge=0, description="how long a step waits for the draft")
    draft_hang_s: float = Field(default=10.0, gt=0, description="a draft that takes longer is restarted")
    submit_s: float = Field(default=10.0, gt=0, description="how long a request may look for an instance")
    carry_s: float = Field(default=120.0, gt=0, description="the same, of one whose instance was lost in the middle of it")
    silence_s: float = Field(
        default=10.0,
        gt=4,
        description="an instance that says nothing for so long is taken for lost; one that lives says something every 2 s",
    )
    drain_s: float = Field(default=60.0, ge=0, description="how long an instance that is removed may finish its streams")


class TailserveConfig(_Strict):
    """Everything a deployment is built from."""

    model: str | None = Field(default=None, description="directory or hub name; none serves the demo model")
    served_model_name: str | None = Field(default=None, description="the name clients use; default: the model's")
    otlp_traces_endpoint: str | None = Field(
        default=None,
        description="URL of a collector that takes OTLP over HTTP; default: as OpenTelemetry's own variables say, else none",
    )
    otlp_metrics_endpoint: str | None = Field(default=None, description="the same of metrics, which Prometheus gets anyway")
    log_format: LogFormat = Field(
        default="text",
        description="of ingress and router, in Serve's log files; json: an object a line, with the request's id",
    )
    log_requests: Logged = Field(
        default="missed",
        description="which requests have a line in the ingress' log file; missed: those that were late, or failed",
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    quantization: Literal["none", "int8"] = Field(
        default="none", description="int8: weights and activations of the verifier's products, on CPUs"
    )
    tensor_parallel_size: int = Field(
        default=1, ge=1, le=8, description="processes, each on a GPU of its own, that share the verifier's layers"
    )
    device: str = "auto"
    attention_backend: Literal["auto", "compiled", "cpu", "cuda", "reference"] = "auto"
    max_model_len: int | None = Field(default=None, ge=2, description="tokens of prompt and answer; default: the model's")
    scheduling_policy: Literal["slack", "priority", "fcfs"] = Field(
        default="slack",
        description="slack: classes keep their targets; priority: by class alone, taking no slot from anybody (vLLM's rule);"
        " fcfs: who came first",
    )
    max_wait_s: float = Field(
        default=60.0,
        gt=0,
        description="with slack: whoever waits for so long goes first, one at a time",
    )
    max_num_seqs: int = Field(default=64, ge=1, le=4096, description="sequences that run at once")
    max_num_batched_tokens: int = Field(default=512, ge=1, description="tokens of one step")
    max_mixed_tokens: int | None = Field(
        default=None, ge=2, description="of a step that reads prompts while others generate; default: 48 on CPUs, else all"
    )
    block_size: int = Field(default=16, ge=1, le=256, description="tokens of one KV block")
    num_kv_blocks: int | None = Field(default=None, ge=1, description="default: from the memory that is free")
    kv_offloading_size: float = Field(
        default=0, ge=0, description="GiB of host memory for KV blocks of sessions for which there is no room; 0: none"
    )
    gpu_memory_utilization: float = Field(default=0.9, gt=0, le=1)
    cpu_threads: int | None = Field(default=None, ge=1, description="threads of the verifier; default: all cores")
    enable_prefix_caching: bool = True
    public_prefixes: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        default=(), description="system prompts, say: whoever begins with one shares its KV blocks with all others who do"
    )
    session_ttl_s: float = Field(
        default=600.0, ge=0, description="for how long a session's KV blocks are kept for its next turn, at most"
    )
    session_share: float = Field(
        default=0.5, ge=0, le=1, description="of the KV blocks, what sessions may keep; each tenant an equal part"
    )
    draft_model: str = Field(
        default="ngram",
        description="ngram, none, demo (the demo model's own), or a directory or hub name: of a model, or what distill made",
    )
    speculation: Speculation = Field(default="auto", description="draft tokens per step; auto: as many as pay")
    pre_speculation: Literal["auto", "off"] | Annotated[int, Field(ge=1, le=64)] = Field(
        default="auto",
        description="outcomes of a step, per sequence, that a draft model prepares for meanwhile; auto: 8 if it has a GPU",
    )
    draft_branches: int = Field(default=4, ge=1, le=8, description="drafts of one request verified together, at most")
    verification: Literal["one_hot", "token", "block"] = Field(
        default="one_hot",
        description="of drafts above temperature 0. one_hot: answers do not depend on the draft; token, block: drafts are "
        "drawn by chance, and answers have the same distribution",
    )
    draft_noise: float = Field(default=0.0, ge=0, description="noise on a draft model's weights, for tests")
    slo_classes: tuple[SloClassConfig, ...] = (
        SloClassConfig(name="critical", priority=0, ttft_s=0.5, tpot_s=0.04),
        SloClassConfig(name="normal", priority=10, ttft_s=5.0, tpot_s=0.2),
    )
    tenants: tuple[TenantConfig, ...] = Field(default=(), description="API keys and what they allow; none: no key is needed")
    tenants_file: str | None = Field(default=None, description="YAML list of more of them: a Secret's file, say")
    default_class: str = "normal"
    urgent_class: str = Field(default="critical", description="class of requests with a negative integer `priority`")
    service_tiers: dict[Literal["auto", "default", "flex", "priority"], str] = Field(
        default={"auto": "normal", "default": "normal", "flex": "normal", "priority": "critical"},
        description="`service_tier` to class",
    )
    resources: Resources = Resources()
    timeouts: Timeouts = Timeouts()
    num_instances: int = Field(default=1, ge=1, description="with autoscaling: at first")
    num_ingresses: int = Field(default=1, ge=1)
    max_open_requests: int = Field(default=8192, ge=1, description="sequences open at one ingress; beyond them 503")
    autoscaling: AutoscalingConfig | None = Field(default=None, description="default: always num_instances")

    @model_validator(mode="after")
    def _check(self) -> TailserveConfig:
        names = [slo.name for slo in self.slo_classes]
        if len(set(names)) != len(names):
            raise ValueError("slo_classes names a class twice: give each its own name")
        used = {"default_class": self.default_class, "urgent_class": self.urgent_class}
        used |= {f"service_tiers.{tier}": name for tier, name in self.service_tiers.items()}
        for field, name in used.items():
            if name not in names:
                raise ValueError(f"{field} is {name!r}, which is no class of slo_classes ({', '.join(names)})")
        self._check_tenants(names)
        self._check_autoscaling()
        if self.tensor_parallel_size > 1 and (self.quantization != "none" or self.attention_backend == "compiled"):
            raise ValueError("tensor_parallel_size is above 1, which neither quantization nor attention_backend: compiled "
                             "goes with: set them to none, and auto")  # fmt: skip
        if self.kv_offloading_size and not self.enable_prefix_caching:
            raise ValueError("kv_offloading_size keeps KV blocks to find them again, which enable_prefix_caching: false "
                             "rules out: leave one of them out")  # fmt: skip
        if self.draft_model in ("none", "ngram") and self.has_prefixes:
            raise ValueError(NEEDS_MODEL.format(self.draft_model))
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens is {self.max_num_batched_tokens}, below max_num_seqs ({self.max_num_seqs}): every "
                "running sequence needs a token per step; raise the former or lower the latter"
            )
        return self

    def _check_tenants(self, class_names: list[str]) -> None:
        hashes = [text for tenant in self.tenants for text in tenant.api_key_hashes]
        if len(set(hashes)) != len(hashes) or len({tenant.name for tenant in self.tenants}) != len(self.tenants):
            raise ValueError("tenants names a tenant or a key twice: a key belongs to one tenant")
        for tenant in self.tenants:
            for name in tenant.classes or ():
                if name not in class_names:
                    raise ValueError(
                        f"tenants.{tenant.name}.classes has {name!r}, which is no class of slo_classes "
                        f"({', '.join(class_names)})"
                    )

    def _check_autoscaling(self) -> None:
        scaling = self.autoscaling
        if scaling is None:
            return
        if not scaling.min_instances <= self.num_instances <= scaling.max_instances:
            raise ValueError(
                f"num_instances is {self.num_instances}, which autoscaling begins with: from {scaling.min_instances} to "
                f"{scaling.max_instances}"
            )
        for slo in self.slo_classes:
            if slo.min_instances > scaling.max_instances:
                raise ValueError(
                    f"slo_classes.{slo.name}.min_instances is {slo.min_instances}, above autoscaling.max_instances "
                    f"({scaling.max_instances})"
                )

    @property
    def has_prefixes(self) -> bool:
        """Whether a class lets the draft write first tokens."""
        return any(slo.speculative_prefix for slo in self.slo_classes)

    @property
    def drafts(self) -> bool:
        """Whether an instance has a draft."""
        asked = self.has_prefixes or any(slo.speculation not in ("off", 0) for slo in self.classes())
        return self.draft_model != "none" and asked

    @property
    def num_outcomes(self) -> int:
        """Outcomes that a draft model prepares for; on the verifier's own device it would only be in the way."""
        if self.pre_speculation == "auto":
            return 8 if self.resources.draft_gpus > 0 and self.resources.verifier_gpus > 0 else 0
        return 0 if self.pre_speculation == "off" else self.pre_speculation

    def classes(self) -> tuple[SloClass, ...]:
        return tuple(slo.to_engine(self.speculation) for slo in self.slo_classes)


def parse_config(data: dict[str, Any]) -> TailserveConfig:
    """Checks a mapping. ConfigError names every wrong field and what it would accept."""
    try:
        return TailserveConfig.model_validate(data)
    except ValidationError as error:
        problems = [
            f"{'.'.join(str(part) for part in problem['loc']) or 'configuration'}: {problem['msg']}"
            for problem in error.errors()
        ]
        first = error.errors()[0]["loc"]
        raise ConfigError("; ".join(problems), param=str(first[0]) if first else None) from None
