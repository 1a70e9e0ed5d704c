"""Routes about the service itself: models, health, readiness, metrics."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response

from reelrt import __version__
from reelrt.service import answers, schemas
from reelrt.service.documents import errors_of
from reelrt.service.metrics import CONTENT_TYPE, Metrics
from reelrt.service.refusals import Refusal
from reelrt.service.routing import Service, json_of

router = APIRouter()


@router.get("/v1/models", response_model=schemas.ModelList, summary="The models that are served")
async def models(request: Request, service: Service) -> JSONResponse:
    """The models, and what each takes; the first is the default."""
    points = request.app.state.settings.remix_points
    found = await run_in_threadpool(service.models)
    return json_of(schemas.ModelList(data=[answers.model(info, points) for info in found]))


@router.get("/health", response_model=schemas.Health, responses=errors_of(503), summary="Whether it lives")
async def health(service: Service) -> JSONResponse:
    """200 while every engine's thread runs: what a supervisor restarts for."""
    if not service.alive:  # no thread is needed to see that: they may all be busy
        raise Refusal(503, "An engine has stopped; the log says why.")
    return json_of(schemas.Health(version=__version__))


@router.get("/ready", response_model=schemas.Ready, responses=errors_of(503), summary="Whether it takes jobs")
async def ready(request: Request, service: Service) -> JSONResponse:
    """200 while jobs are taken: what a balancer asks."""
    found = await run_in_threadpool(service.health)
    if not found.ready or request.app.state.streams.stopping:
        raise Refusal(503, found.reason or "The service is stopping.", headers={"Retry-After": "5"})
    return json_of(schemas.Ready())


@router.get(
    "/metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
    summary="Figures for Prometheus",
)
async def metrics(request: Request) -> Response:
    """Queue, batches, times, memory, caches, rejections."""
    registry: Metrics = request.app.state.metrics
    return Response(await run_in_threadpool(registry.text), headers={"Content-Type": CONTENT_TYPE})
