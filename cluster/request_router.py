"""Which instance a call goes to. Serve consults this for every handle call to a router deployment."""

from __future__ import annotations

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica


class InstanceRequestRouter(RequestRouter):
    """Calls with a keyword argument `instance` go to that replica, all others to the one with the fewest open calls.

    When the named replica is gone the call goes to any other, which then says so: a call must not wait for a replica that
    will not come back.
    """

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """One rank of candidates; Serve takes the least busy of a rank."""
        instance = pending_request.kwargs.get("instance") if pending_request is not None else None
        pinned = [replica for replica in candidate_replicas if replica.replica_id.unique_id == instance]
        return [pinned or candidate_replicas]
