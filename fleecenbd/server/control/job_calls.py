"""The calls about jobs: from a request's parts to an answer, without HTTP."""

from __future__ import annotations

from fleecenbd.server.control.bodies import CancelBody, JobBody, JobList, RateBody
from fleecenbd.server.control.calls import check_name, decode
from fleecenbd.server.control.errors import from_os_error
from fleecenbd.server.job_asks import JobAsk
from fleecenbd.server.jobs import Jobs
from fleecenbd.server.views import JobView


class JobCalls:
    """What can be asked of one server's jobs."""

    def __init__(self, jobs: Jobs) -> None:
        self._jobs = jobs

    def list(self) -> JobList:
        return JobList(self._jobs.views())

    def show(self, name: str) -> JobView:
        try:
            return self._jobs.find(check_name(name, "a job"))
        except OSError as error:
            raise from_os_error(error) from None

    def start(self, body: bytes) -> JobView:
        """Start one; as it is then."""
        asked = decode(body, JobBody)
        # The body's pattern lets "..", and a newline at the end, through.
        check_name(asked.session, "a session")
        check_name(asked.disk, "a disk")
        if asked.bitmap is not None:
            check_name(asked.bitmap, "a bitmap")
        fields = {field: getattr(asked, field) for field in asked.__struct_fields__}
        try:
            return self._jobs.start(JobAsk(**fields))
        except OSError as error:
            raise from_os_error(error) from error

    def pause(self, name: str) -> JobView:
        try:
            return self._jobs.pause(check_name(name, "a job"))
        except OSError as error:
            raise from_os_error(error) from None

    def resume(self, name: str) -> JobView:
        try:
            return self._jobs.resume(check_name(name, "a job"))
        except OSError as error:
            raise from_os_error(error) from None

    def set_rate(self, name: str, body: bytes) -> JobView:
        """The body's limit, from now on."""
        check_name(name, "a job")
        rate = decode(body, RateBody).rate
        try:
            return self._jobs.set_rate(name, rate)
        except OSError as error:
            raise from_os_error(error) from None

    async def cancel(self, name: str, body: bytes) -> JobView:
        """End it; answered once it has ended."""
        check_name(name, "a job")
        keep = decode(body, CancelBody).keep
        try:
            return await self._jobs.cancel(name, keep=keep)
        except OSError as error:
            raise from_os_error(error) from None
