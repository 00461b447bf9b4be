"""The one error a user is meant to read.

Everything a person can do wrong (a missing file, a tensor of the wrong shape, an output directory
that is not empty) raises `ProxsparseError`; the command line prints its text without a traceback.
Anything else that escapes is a bug of ours.
"""


class ProxsparseError(ValueError):
    """Bad input: the message names the value, the rule it breaks and the way out."""


class Interrupted(ProxsparseError):
    """The run was stopped on request and has saved what is needed to go on."""


class ProcessLost(ProxsparseError):
    """One of several processes ended and took the job with it; each of the others says so."""
