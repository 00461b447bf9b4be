"""A child process that tries candidates: if one crashes or hangs, the run goes on without it."""

from __future__ import annotations

import json
import os
import select
import subprocess
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from proxsparse.backends.choice import Candidate, Cell
from proxsparse.tuning.search import Outcome, Unmeasurable

_START_SECONDS = 180.0  # a child imports torch, starts CUDA and compiles kernels
_MEASURE_SECONDS = 60.0  # a candidate that takes longer hangs


class _ChildFailed(Exception):
    """The child crashed or hung while it answered."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(detail)
        self.kind = kind


class ChildWorker:
    """Tries candidates in a child process, and starts a new one when that dies or hangs.

    The child reads requests and writes answers, a JSON object a line; its first line says that it
    is ready. What else it has to say goes to stderr, whose end is quoted when it crashes.
    """

    def __init__(
        self,
        command: Sequence[str],
        environment: dict[str, str] | None = None,
        start_seconds: float = _START_SECONDS,
        measure_seconds: float = _MEASURE_SECONDS,
    ) -> None:
        self._command = list(command)
        self._environment = environment
        self._start_seconds, self._measure_seconds = start_seconds, measure_seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115
        self._unread = b""

    def __enter__(self) -> ChildWorker:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()
        self._stderr.close()

    def candidates(self, cell: Cell) -> list[Candidate]:
        """What the child can try for the cell.

        Raises:
            Unmeasurable: the child cannot start, lacks memory or fails to set the cell up.
        """
        try:
            answer = self._ask({"do": "candidates", "cell": cell}, self._measure_seconds)
        except _ChildFailed as error:
            raise Unmeasurable(f"the tuning process {error.kind}: {error}") from error
        if "problem" in answer:
            raise Unmeasurable(answer["problem"])
        return [Candidate(*fields) for fields in answer["candidates"]]

    def measure(self, cell: Cell, candidate: Candidate, tokens: int, is_final: bool) -> Outcome:
        """The child's verdict, or that it did not survive it."""
        request = {
            "do": "measure",
            "cell": cell,
            "candidate": candidate,
            "tokens": tokens,
            "final": is_final,
        }
        try:
            if self._process is None:  # the last trial broke it
                self._start()
        except _ChildFailed as error:
            raise Unmeasurable(f"the tuning process {error.kind}: {error}") from error
        try:
            return Outcome(**self._ask(request, self._measure_seconds))
        except _ChildFailed as error:
            return Outcome(error.kind, str(error))

    def _ask(self, request: dict[str, Any], seconds: float) -> dict[str, Any]:
        if self._process is None:
            self._start()
        assert self._process is not None and self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            raise self._crash() from None
        return self._answer(seconds)

    def _start(self) -> None:
        self._stderr.seek(0)
        self._stderr.truncate()
        self._unread = b""
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env=self._environment,
        )
        self._answer(self._start_seconds)

    def _answer(self, seconds: float) -> dict[str, Any]:
        """The next line of the child, waited for at most this long."""
        assert self._process is not None and self._process.stdout is not None
        end = time.monotonic() + seconds
        while b"\n" not in self._unread:
            ready, _, _ = select.select(
                [self._process.stdout], [], [], max(0.0, end - time.monotonic())
            )
            if not ready:
                self._stop()
                raise _ChildFailed("hung", f"no answer within {seconds:.0f} s")
            received = os.read(self._process.stdout.fileno(), 1 << 16)
            if not received:
                raise self._crash()
            self._unread += received
        line, _, self._unread = self._unread.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _crash(self) -> _ChildFailed:
        assert self._process is not None
        code = self._stop()
        self._stderr.seek(0)
        lines = self._stderr.read().decode(errors="replace").strip().splitlines()
        return _ChildFailed("crashed", f"exit code {code}: {lines[-1] if lines else 'no message'}")

    def _stop(self) -> int | None:
        """Ends the child, by force if need be, and returns its exit code."""
        process, self._process = self._process, None
        if process is None:
            return None
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            try:
                pipe.close()
            except OSError:  # it died with a request half written
                continue
        try:
            return process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            process.kill()
        try:
            return process.wait(timeout=30)
        except subprocess.TimeoutExpired:  # stuck in the driver: nothing else can end it
            return None
