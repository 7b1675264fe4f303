"""What becomes of a submitted job that is stopped, from the job's side.

`ray job stop` has the job's supervisor, an actor on the node where the job's command runs, send SIGTERM (or what
`RAY_JOB_STOP_SIGNAL` says) and, `RAY_JOB_STOP_WAIT_TIME_S` later, SIGKILL. The supervisor reads the variable when it
stops the job, from its own environment: that of `ray start` on its node, or of the job's runtime environment. The
command inherits this environment, so it sees what the user has set; what nobody has set is 3 seconds.
"""

from __future__ import annotations

import json
import logging
import math
import os
from typing import Any

import ray
from ray.dashboard.modules.job.common import JOB_ACTOR_NAME_TEMPLATE, SUPERVISOR_ACTOR_RAY_NAMESPACE

logger = logging.getLogger(__name__)

_WAIT = "RAY_JOB_STOP_WAIT_TIME_S"
_RAYS_WAIT_S = 3
_AFTER_GRACE_S = 30
"""For killing workers that did not stop, and for saying so."""
_ANSWER_S = 10.0


def stop_time_s(grace_s: float) -> float:
    """Return the seconds that a stop may take before Ray kills this process; infinite unless it is a submitted job's.

    Where nobody has set `RAY_JOB_STOP_WAIT_TIME_S`, has the job's supervisor wait for the grace and a little longer.
    What somebody has set stays; a warning says so if it is too little.

    Args:
        grace_s: Seconds that the workers should have.
    """
    job = _submission_id()
    if job is None:
        return math.inf
    wait_s = _parsed(os.environ.get(_WAIT) or _extended(job, math.ceil(grace_s) + _AFTER_GRACE_S))
    if wait_s < grace_s:
        logger.warning(
            "`ray job stop` kills this job after %d s, less than the %g s of --stop-grace-s: put "
            "%s=%d before `ray start --head`, or into the job's runtime environment",
            *(wait_s, grace_s, _WAIT, math.ceil(grace_s) + _AFTER_GRACE_S),
        )
    # What is left after the grace is for the last words.
    return max(wait_s - _AFTER_GRACE_S, 0.75 * wait_s)


def _submission_id() -> str | None:
    """The id of the submitted job whose command this process belongs to."""
    config: dict[str, Any] = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}")
    submission: str | None = (config.get("metadata") or {}).get("job_submission_id")
    return submission


def _extended(job: str, wait_s: int) -> str:
    """Set the variable where the supervisor will read it, unless it is set there; returns what it is now."""
    try:
        supervisor: Any = ray.get_actor(
            JOB_ACTOR_NAME_TEMPLATE.format(job_id=job), namespace=SUPERVISOR_ACTOR_RAY_NAMESPACE
        )
        # Sent by value: the supervisor need not have our modules.
        setting = supervisor.__ray_call__.remote(
            lambda _, name, value: os.environ.setdefault(name, value), _WAIT, str(wait_s)
        )
        return str(ray.get(setting, timeout=_ANSWER_S))
    except Exception as error:  # of any kind, as it is Ray's inside: what nobody can extend is what it was
        logger.debug("cannot ask Ray to wait longer when it stops this job: %s", error)
        return str(_RAYS_WAIT_S)


def _parsed(setting: str) -> int:
    try:
        return int(setting)
    except ValueError:  # the supervisor fails over it, and the job is killed at once
        return 0
