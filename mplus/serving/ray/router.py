"""OwnerRouter: sends what is about a memory to the engine that owns it, and to no other."""

from __future__ import annotations

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from mplus.serving.ray.placement import owner


class OwnerRouter(RequestRouter):
    """Routes by the key that a handle was given as ``multiplexed_model_id``; without one, to the least busy replica.

    ``serve.multiplexed`` prefers a replica and takes another one after a second; a memory has one writer, always. A
    request whose owner is busy waits for it.
    """

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Return the replicas that may take a request: the owner of its memory alone, or all."""
        if pending_request is None or not candidate_replicas:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True  # else a busy owner is asked again without a pause
        key = pending_request.metadata.multiplexed_model_id
        if not key:
            return [candidate_replicas]
        by_name = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        return [[by_name[owner(key, by_name)]]]
