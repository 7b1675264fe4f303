"""Errors that a user of the cluster part can act on; their message names the remedy."""


class ClusterError(RuntimeError):
    """The worker group, its processes or its storage cannot do what was asked."""


class WorkerLostError(ClusterError):
    """A worker process or its node died, or the group never formed; a second attempt may succeed."""


class SnapshotError(ClusterError):
    """A snapshot is missing, not finished, damaged or of a newer program; nothing of it was used."""


class SnapshotWriteError(SnapshotError):
    """A snapshot could not be written or committed; the one before it is kept."""
