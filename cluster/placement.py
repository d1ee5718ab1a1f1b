"""Where the processes of one model instance run."""

from __future__ import annotations

from tailserve.cluster.config import TailserveConfig

ROUTER_BUNDLE, VERIFIER_BUNDLE = 0, 1


def bundles(config: TailserveConfig) -> list[dict[str, float]]:
    """Placement-group bundles of an instance: router, each rank of the verifier and, if there is one, draft."""
    wanted = config.resources
    ranks = [_bundle(wanted.verifier_cpus, wanted.verifier_gpus)] * config.tensor_parallel_size
    result = [_bundle(wanted.router_cpus, 0), *ranks]
    if config.drafts:
        result.append(_bundle(wanted.draft_cpus, wanted.draft_gpus))
    return result


def draft_bundle(config: TailserveConfig) -> int:
    """The number of the draft's bundle."""
    return VERIFIER_BUNDLE + config.tensor_parallel_size


def verifier_actor_options(config: TailserveConfig) -> dict[str, float]:
    return {"num_cpus": config.resources.verifier_cpus, "num_gpus": config.resources.verifier_gpus}


def draft_actor_options(config: TailserveConfig) -> dict[str, float]:
    return {"num_cpus": config.resources.draft_cpus, "num_gpus": config.resources.draft_gpus}


def total_cpus(config: TailserveConfig) -> float:
    """Logical CPUs that the whole deployment needs."""
    instance = sum(bundle.get("CPU", 0.0) for bundle in bundles(config))
    return config.num_instances * instance + config.num_ingresses * config.resources.ingress_cpus


def _bundle(cpus: float, gpus: float) -> dict[str, float]:
    # Ray refuses empty bundles and ignores zero entries.
    bundle = {"CPU": max(cpus, 0.01)}
    return bundle | {"GPU": gpus} if gpus else bundle
