"""The client of every measurement: fio with its NBD engine. Source: fio(1); its HOWTO, "JSON output"."""

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.errors import BenchError
from bench.workloads import Workload

#: What fio may take over the time it was given before something is stuck: twice the default deadline of a
#: device, and the slowest of starts.
PATIENCE_S = 30.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a client saw. Latencies are from issue to completion; megabytes are 10**6 bytes."""

    ops: int
    errors: int
    iops: float
    mbps: float
    p50_us: float
    p99_us: float
    max_us: float


def command(workload: Workload, uri: str, seconds: float | None) -> list[str]:
    """The command line for ``seconds`` of ``workload``; once over the whole disk when that is None."""
    return [
        "fio",
        "--name=bench",
        "--ioengine=nbd",
        f"--uri={uri}",
        *workload.options(),
        *([] if seconds is None else ["--time_based", f"--runtime={round(seconds * 1000)}ms"]),
        "--group_reporting",
        "--unified_rw_reporting=mixed",
        "--lat_percentiles=1",
        "--clat_percentiles=0",
        "--percentile_list=50:99",
        "--eta=never",
        "--output-format=json",
    ]


def parse(text: str) -> Outcome:
    """The outcome in fio's report, which warnings may stand in front of.

    Raises:
        BenchError: it is no such report, or tells of not a single request.
    """
    try:
        job = json.loads(text[text.index("{\n") :])["jobs"][0]
        mixed: dict[str, Any] = job["mixed"]
        latency = mixed["lat_ns"]
        percentile = latency["percentile"]
        return Outcome(
            ops=mixed["total_ios"],
            errors=job.get("total_err", 0) or int(job["error"] != 0),
            iops=mixed["iops"],
            mbps=mixed["bw_bytes"] / 1e6,
            p50_us=percentile["50.000000"] / 1e3,
            p99_us=percentile["99.000000"] / 1e3,
            max_us=latency["max"] / 1e3,
        )
    except (ValueError, LookupError, TypeError) as error:
        raise BenchError(f"fio's report is not understood: {error!r}; it begins {text[:200]!r}") from error


class Client:
    """A fio that runs. Use as a context; leaving it early ends fio.

    Args:
        directory: where fio puts what it leaves behind.
    """

    def __init__(self, workload: Workload, uri: str, seconds: float | None, directory: Path) -> None:
        self._patience_s = (seconds or 0.0) + PATIENCE_S
        self._process = subprocess.Popen(
            command(workload, uri, seconds),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=directory,
            start_new_session=True,
        )

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.kill()
        self._process.communicate()

    def has_ended(self) -> bool:
        """Whether fio has ended."""
        return self._process.poll() is not None

    def wait_outcome(self) -> Outcome:
        """Wait for the end; what it saw, errors of requests among it.

        Raises:
            BenchError: it hung, or failed without a report.
        """
        try:
            output, complaint = self._process.communicate(timeout=self._patience_s)
        except subprocess.TimeoutExpired:
            raise BenchError(f"fio did not end within {self._patience_s:.0f} s: a request hangs") from None
        try:
            return parse(output)
        except BenchError as error:
            lines = complaint.split("\n")
            detail = next(
                (line for line in lines if line.startswith("fio: ") and "connected to" not in line), ""
            )
            raise BenchError(f"fio ended with {self._process.returncode}: {detail or error}") from error


def run(workload: Workload, uri: str, seconds: float | None, directory: Path) -> Outcome:
    """Run fio to its end.

    Raises:
        BenchError: it hung or failed, or a request did; figures with errors among them are worth nothing.
    """
    with Client(workload, uri, seconds, directory) as client:
        outcome = client.wait_outcome()
    if outcome.errors:
        raise BenchError(f"fio had {outcome.errors} errors in {workload.name} on {uri}")
    return outcome
