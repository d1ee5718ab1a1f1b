"""Which instance a call goes to. Serve consults this for every handle call to a router deployment."""

from __future__ import annotations

import time

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

# The module, and its names by it: Serve pickles this one by value, and `LOADS` would be a copy that nobody feeds.
from tailserve.cluster import affinity


class InstanceRequestRouter(RequestRouter):
    """Calls with a keyword argument `instance` go to that replica, those with `placing` where `affinity.Loads.choose` says,
    all others to the one with the fewest open calls.

    When the named replica is gone the call goes to any other, which then says so: a call must not wait for a replica that
    will not come back.
    """

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """One rank of candidates; Serve takes the least busy of a rank."""
        asked = pending_request.kwargs if pending_request is not None else {}
        placing: affinity.Placing | None = asked.get("placing")
        chosen = {str(asked.get("instance"))}
        if placing is not None and candidate_replicas:
            names = [replica.replica_id.unique_id for replica in candidate_replicas]
            chosen = affinity.LOADS.choose(placing, names, time.monotonic())
        return [[replica for replica in candidate_replicas if replica.replica_id.unique_id in chosen] or candidate_replicas]
