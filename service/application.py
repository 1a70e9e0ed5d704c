"""The application that a server runs: routes, page and document behind their guards."""

from __future__ import annotations

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from reelrt import __version__
from reelrt.errors import ReelError
from reelrt.service import answers, assets, documents, http, probes
from reelrt.service.config import Settings
from reelrt.service.guards import Bodies, Keys, SameSite, SecurityHeaders, is_loopback
from reelrt.service.heartbeat import Heartbeat
from reelrt.service.jobservice import VideoService
from reelrt.service.metrics import Metrics
from reelrt.service.refusals import answer_in_this_form, log
from reelrt.service.sse import FewStreams, Streams


class Application:
    """An ASGI application over a job service, which it neither opens nor closes.

    Attributes:
        streams: The open event streams; `stop` ends them.
        heartbeat: Measures the event loop that answers; beats once it is started there.

    Args:
        service: The job service.
        settings: The configuration.
    """

    def __init__(self, service: VideoService, settings: Settings) -> None:
        app = FastAPI(title="ReelRT", version=__version__, docs_url=None, redoc_url=None)
        self._metrics = Metrics(service)
        self.streams = Streams(settings.streams, self._metrics.streams_refused.inc)
        self.heartbeat = Heartbeat(self._metrics.beat)
        app.state.service, app.state.settings = service, settings
        app.state.streams, app.state.metrics = self.streams, self._metrics
        answer_in_this_form(app)
        app.add_exception_handler(ReelError, _answer)
        app.include_router(http.router)
        app.include_router(probes.router)
        app.include_router(assets.page_routes())
        documents.describe(app, bool(settings.keys))
        guarded: ASGIApp = Bodies(app, settings.most_body, settings.body_seconds)
        guarded = Keys(FewStreams(guarded, self.streams), settings.keys)
        guarded = SameSite(guarded, loopback=is_loopback(settings.host) and not settings.keys)
        self._routes, self._app = app, SecurityHeaders(guarded)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, and count it."""

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.count(scope["method"], message["status"])
            await send(message)

        await self._app(scope, receive, counted if scope["type"] == "http" else send)

    async def warm_up(self) -> None:
        """Let the framework do now what it leaves to the first request, and would hold everybody up with.

        It works out every route when a path is first looked for, writes the document when it is asked for,
        and loads what runs threads when one is first needed.
        """

        async def nothing() -> Message:
            return {"type": "http.disconnect"}

        async def unread(message: Message) -> None:
            pass

        scope = {"type": "http", "method": "GET", "query_string": b"", "headers": [], "root_path": ""}
        for path in ("/health", "/openapi.json", "/no-such-page"):
            asked = {
                **scope,
                "path": path,
                "raw_path": path.encode(),
                "scheme": "http",
                "http_version": "1.1",
            }
            await self._routes(asked, nothing, unread)


async def _answer(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ReelError)
    refusal = answers.refusal(error)
    if refusal.status == 500:
        log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return refusal.response()
