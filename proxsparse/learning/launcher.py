"""Which of a launcher's processes this one is, as torchrun and accelerate launch say it.

Needs no library: the command line asks before it imports any. A RANK alone means nothing, since
schedulers set it for programs of one process as well.
"""

from __future__ import annotations

import os

from proxsparse.errors import ProxsparseError


def world_size() -> int:
    """How many processes a launcher has started for this job; 1 without a launcher.

    Raises:
        ProxsparseError: WORLD_SIZE is no number of processes.
    """
    return _number("WORLD_SIZE", 1, minimum=1)


def rank() -> int:
    """This process's number, from 0.

    Raises:
        ProxsparseError: WORLD_SIZE says that there are several, and RANK is none of them.
    """
    world = world_size()
    if world == 1:
        return 0
    number = _number("RANK", None, minimum=0)
    if number >= world:
        raise ProxsparseError(
            f"RANK is {number} and WORLD_SIZE {world}: ranks go from 0 to {world - 1}; start the "
            "job with torchrun, or unset both"
        )
    return number


def is_main() -> bool:
    """Whether this process reports and writes files."""
    return rank() == 0


def check_meeting_point() -> None:
    """Refuse several processes that have nowhere to meet.

    Raises:
        ProxsparseError: MASTER_ADDR or MASTER_PORT is missing.
    """
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise ProxsparseError(
            f"WORLD_SIZE is {world_size()}, but {' and '.join(missing)} is not set: start the job "
            "with torchrun, or unset WORLD_SIZE"
        )


def require_one_process(what: str) -> None:
    """Refuse to run the same job several times side by side.

    Raises:
        ProxsparseError: a launcher has started several processes.
    """
    if world_size() > 1:
        raise ProxsparseError(
            f"{what} runs in one process, and WORLD_SIZE is {world_size()}: start it without "
            "torchrun, or unset WORLD_SIZE"
        )


def _number(name: str, default: int | None, *, minimum: int) -> int:
    text = os.environ.get(name)
    if text is None and default is not None:
        return default
    try:
        number = int(text or "")
    except ValueError:
        number = minimum - 1
    if number < minimum:
        raise ProxsparseError(
            f"the environment variable {name} is {text!r}: a launcher sets it to a whole number, "
            f"at least {minimum}; start the job with torchrun, or unset WORLD_SIZE"
        )
    return number
