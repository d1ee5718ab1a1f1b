"""Which instance a call goes to. Serve consults this for every handle call to a router deployment."""

from __future__ import annotations

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

# The module, and its names by it: Serve pickles this one by value, and `LOADS` would be a copy that nobody reads.
from tailserve.cluster import affinity


class InstanceRequestRouter(RequestRouter):
    """Calls with a keyword argument `instance` go to that replica, all others to the one with the fewest open calls.

    When the named replica is gone the call goes to any other, since a call must not wait for a replica that will not come
    back. That one takes a request; to all else it says that it is not the one.
    """

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        self._note()

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        super().on_replica_actor_died(replica_id)
        self._note()

    def _note(self) -> None:
        affinity.LOADS.note_running(replica_id.unique_id for replica_id in self.curr_replicas)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """One rank of candidates; Serve takes the least busy of a rank."""
        wanted = pending_request.kwargs.get("instance") if pending_request is not None else None
        return [[replica for replica in candidate_replicas if replica.replica_id.unique_id == wanted] or candidate_replicas]
