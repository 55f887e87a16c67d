"""The state of a server as Prometheus reads it: gathered when it is asked for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    Metric,
    SummaryMetricFamily,
)
from prometheus_client.registry import Collector

from fleecenbd.server.jobs import Jobs
from fleecenbd.server.sessions import Sessions
from fleecenbd.server.views import DiskView, FleeceView, JobView, SessionView

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_FLEECE = ["session", "disk"]


class Metrics(Collector):
    """One server's metrics."""

    def __init__(self, sessions: Sessions, jobs: Jobs) -> None:
        self._sessions = sessions
        self._jobs = jobs
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    def text(self) -> bytes:
        """Everything, as of now; called on the loop's thread."""
        return bytes(generate_latest(self._registry))

    def describe(self) -> Iterable[Metric]:
        """Nothing is known before there are disks."""
        return []

    def collect(self) -> Iterator[Metric]:
        """A family after the other."""
        yield from _disks(self._sessions.disk_views())
        views = self._sessions.active_views()
        yield from _sessions(views)
        yield from _fleeces([(view.name, fleece) for view in views for fleece in view.disks])
        finished = CounterMetricFamily(
            "fleecenbd_sessions_finished", "Sessions that are finished.", labels=["result"]
        )
        for result, count in self._sessions.results.items():
            finished.add_metric([result], count)
        yield finished
        yield from _jobs(self._jobs.running_views())
        ended = CounterMetricFamily(
            "fleecenbd_jobs_ended", "Jobs that have ended.", labels=["result"]
        )
        for result, count in self._jobs.results.items():
            ended.add_metric([result], count)
        yield ended
        yield CounterMetricFamily(
            "fleecenbd_jobs_durable_bytes",
            "What jobs have made durable in their targets.",
            value=self._jobs.durable_bytes,
        )


def _disks(disks: list[DiskView]) -> Iterator[Metric]:
    size = GaugeMetricFamily("fleecenbd_disk_size_bytes", "Size of a disk.", labels=["disk"])
    clients = GaugeMetricFamily(
        "fleecenbd_disk_clients", "Clients of a guest export.", labels=["disk"]
    )
    writes = CounterMetricFamily(
        "fleecenbd_disk_guest_writes", "Requests that may have changed a disk.", labels=["disk"]
    )
    for disk in disks:
        size.add_metric([disk.name], disk.size)
        clients.add_metric([disk.name], len(disk.clients))
        writes.add_metric([disk.name], disk.guest_writes)
    yield from (size, clients, writes)


def _sessions(sessions: list[SessionView]) -> Iterator[Metric]:
    state = GaugeMetricFamily(
        "fleecenbd_session_state",
        "1 for the state that a session is in.",
        labels=["session", "id", "state"],
    )
    armed = GaugeMetricFamily(
        "fleecenbd_session_armed_timestamp_seconds", "When it began.", labels=["session"]
    )
    pause = GaugeMetricFamily(
        "fleecenbd_session_pause_seconds",
        "How long guest writes were held when it began.",
        labels=["session"],
    )
    for session in sessions:
        state.add_metric([session.name, session.id, session.state], 1)
        armed.add_metric([session.name], session.armed_at)
        pause.add_metric([session.name], session.pause_ms / 1000)
    yield from (state, armed, pause)


def _jobs(jobs: list[JobView]) -> Iterator[Metric]:
    labels = ["session", "disk"]
    states = GaugeMetricFamily("fleecenbd_jobs", "Jobs that have not ended.", labels=["state"])
    to_copy = GaugeMetricFamily(
        "fleecenbd_job_to_copy_bytes", "What has to become durable in all.", labels=labels
    )
    durable = GaugeMetricFamily(
        "fleecenbd_job_durable_bytes", "What is durable in the target.", labels=labels
    )
    for state in ("running", "paused"):
        states.add_metric([state], sum(job.state == state for job in jobs))
    for job in jobs:
        if job.progress is not None:
            to_copy.add_metric([job.session, job.disk], job.progress.to_copy)
            durable.add_metric([job.session, job.disk], job.progress.durable)
    yield from (states, to_copy, durable)


def _fleeces(fleeces: list[tuple[str, FleeceView]]) -> Iterator[Metric]:
    def gauge(name: str, text: str) -> GaugeMetricFamily:
        return GaugeMetricFamily(f"fleecenbd_fleece_{name}", text, labels=_FLEECE)

    accessible = gauge("accessible_bytes", "What may still be read.")
    released = gauge("released_bytes", "What was given up, by TRIM or by a break.")
    temp = gauge("temp_bytes", "Old data that the temp image holds.")
    peak = gauge("temp_peak_bytes", "The most that it held.")
    limit = gauge("temp_limit_bytes", "The most that it may hold, where there is a limit.")
    room = gauge("temp_room_bytes", "What its file system has left for it, above the reserve.")
    in_flight = gauge("copies_in_flight", "Copies of old data in flight.")
    clients = gauge("clients", "Clients of the fleecing export.")
    longest = gauge("guest_wait_max_seconds", "The longest wait of a guest write.")
    p99 = gauge("guest_wait_p99_seconds", "What 99 of 100 waits of guest writes did not pass.")
    copied = CounterMetricFamily(
        "fleecenbd_fleece_copied_bytes", "Old data that was copied.", labels=_FLEECE
    )
    copies = CounterMetricFamily(
        "fleecenbd_fleece_copies", "Copies that have ended.", labels=[*_FLEECE, "result"]
    )
    waits = SummaryMetricFamily(
        "fleecenbd_fleece_guest_wait_seconds",
        "Waits of guest writes for old data to be kept.",
        labels=_FLEECE,
    )
    throttled = SummaryMetricFamily(
        "fleecenbd_fleece_throttled_seconds",
        "Delays of guest writes because the temp image was nearly full.",
        labels=_FLEECE,
    )
    for session, fleece in fleeces:
        labels = [session, fleece.disk]
        accessible.add_metric(labels, fleece.accessible)
        released.add_metric(labels, fleece.released)
        temp.add_metric(labels, fleece.temp.now)
        peak.add_metric(labels, fleece.temp.peak)
        if fleece.temp.limit is not None:
            limit.add_metric(labels, fleece.temp.limit)
        if fleece.temp.room is not None:
            room.add_metric(labels, fleece.temp.room)
        in_flight.add_metric(labels, fleece.copies.in_flight)
        clients.add_metric(labels, len(fleece.clients))
        wait = fleece.guest_wait
        longest.add_metric(labels, wait.max)
        p99.add_metric(labels, wait.p99)
        waits.add_metric(labels, wait.count, wait.mean * wait.count)
        throttled.add_metric(labels, wait.throttled, wait.throttled_time)
        copied.add_metric(labels, fleece.copied)
        for result in ("done", "cancelled", "failed"):
            copies.add_metric([*labels, result], getattr(fleece.copies, result))
    yield from (accessible, released, temp, peak, limit, room, in_flight, clients, longest, p99)
    yield from (copied, copies, waits, throttled)
