"""The HTTP application: OpenAPI at ``/openapi.json``. Every answer is JSON; a refusal is ``{"error": "…"}``.

Handlers are all ``async`` and on the manager's own thread (FastAPI would put others on a thread pool,
where the store's connection is not at home).
"""

import logging
import os
from dataclasses import asdict
from typing import Any

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from backends import DeviceError
from proxy.errors import InvalidError, NotFoundError, RefusedError, StandfastError
from proxy.manager.service import Service
from proxy.manager.views import disk_view, domain_summary, domain_view, event_view, group_view

log = logging.getLogger("standfast.api")

#: A long poll ends after this with whatever there is, so that no proxy in between loses patience.
POLL_MAX_S = 30.0
EVENTS_PER_ANSWER = 1000


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class NewGroup(_Body):
    """A group to make of devices, which are labelled."""

    name: str
    devices: list[str] = Field(min_length=1)
    layout: str = "linear"
    force: bool = False


class NewDomain(_Body):
    """A domain to put online."""

    name: str
    size: str
    active: str
    backups: list[str] = []
    replication: str = "sync"
    listen: str = ""
    failback: str = "manual"
    accept_loss: str = "manual"
    no_leg: str = "hold"


class Nothing(_Body):
    """An order with nothing to add. It is read all the same: an answer that comes before ends the connection."""


class Hold(_Body):
    """For how long to hold; until the release when absent."""

    timeout_s: float | None = Field(default=None, gt=0, le=30 * 24 * 3600)


class Move(_Body):
    """The group to move to, and the leg that leaves for it; the active one when absent."""

    to: str
    replace: str | None = None


class NewLeg(_Body):
    """The group of a backup to add."""

    group: str


class Policies(_Body):
    """Policies to set; what is absent stays as it is."""

    failback: str | None = None
    accept_loss: str | None = None
    no_leg: str | None = None


class NewDisk(_Body):
    """A disk to make in a domain."""

    name: str
    size: str


class Size(_Body):
    """A new size."""

    size: str


class Target(_Body):
    """The group to go to, chosen by preference when absent; it may lack something only if a loss is accepted."""

    to: str | None = None
    accept_loss: bool = False


class Verify(_Body):
    """How fast to compare, as a size a second, and whether to repair the backups."""

    rate: str | None = None
    repair: bool = False


class Resync(_Body):
    """The leg to bring back, all outdated ones when absent; and what copies may take a second, as a size."""

    group: str | None = None
    rate: str | None = None


def application(service: Service) -> FastAPI:
    """The manager's HTTP application."""
    app = FastAPI(
        title="Standfast", summary="Storage addresses that stand fast", docs_url=None, redoc_url=None
    )
    _add_errors(app)
    _add_groups(app, service)
    _add_domains(app, service)
    _add_disks(app, service)

    @app.get("/status")
    async def status() -> dict[str, Any]:
        """Whether the manager is ready, and how its domains are."""
        return {
            "ready": True,
            "pid": os.getpid(),
            "run": str(service.run_directory),
            "domains": [domain_summary(service, domain) for domain in service.store.domains()],
            "last_event": service.store.last_event_id(),
        }

    @app.get("/events")
    async def events(
        after: int = Query(default=0, ge=0, le=2**62),
        limit: int = Query(default=EVENTS_PER_ANSWER, ge=1, le=EVENTS_PER_ANSWER),
        wait_s: float = Query(default=0.0, ge=0, le=POLL_MAX_S),
    ) -> list[dict[str, Any]]:
        """Events after one of them; waits for the first when asked to."""
        version = service.version
        found = service.store.events(after, limit)
        if not found and wait_s:
            await service.wait_change(version, wait_s)
            found = service.store.events(after, limit)
        return [event_view(event) for event in found]

    return app


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(StandfastError)
    async def refuse(request: Request, error: StandfastError) -> JSONResponse:
        status = 500
        if isinstance(error, NotFoundError):
            status = 404
        elif isinstance(error, InvalidError):
            status = 422
        elif isinstance(error, RefusedError):
            status = 409
        return JSONResponse({"error": str(error)}, status)

    @app.exception_handler(DeviceError)
    async def refuse_device(request: Request, error: DeviceError) -> JSONResponse:
        return JSONResponse({"error": str(error)}, 409)

    @app.exception_handler(RequestValidationError)
    async def refuse_form(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        return JSONResponse({"error": f"{where}: {first['msg']}"}, 422)

    @app.exception_handler(Exception)
    async def confess(request: Request, error: Exception) -> JSONResponse:
        # The boundary: the operator gets a line, the log the rest.
        log.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return JSONResponse(
            {
                "error": f"the manager failed inside ({type(error).__name__}: {error}); its log has the details"
            },
            500,
        )


def _add_groups(app: FastAPI, service: Service) -> None:
    @app.get("/groups")
    async def list_groups() -> list[dict[str, Any]]:
        return [group_view(service, group) for group in service.store.groups()]

    @app.post("/groups", status_code=201)
    async def create_group(body: NewGroup) -> dict[str, Any]:
        group = await service.create_group(body.name, body.devices, body.layout, force=body.force)
        return group_view(service, group)

    @app.get("/groups/{name}")
    async def show_group(name: str) -> dict[str, Any]:
        return group_view(service, service.store.group(name))

    @app.post("/groups/{name}/accept")
    async def accept_group(name: str) -> dict[str, Any]:
        return {"generation": await service.accept_group(name)}

    @app.delete("/groups/{name}")
    async def remove_group(name: str) -> dict[str, Any]:
        return {"unreached": await service.remove_group(name)}


def _add_domains(app: FastAPI, service: Service) -> None:
    @app.get("/domains")
    async def list_domains() -> list[dict[str, Any]]:
        return [domain_summary(service, domain) for domain in service.store.domains()]

    @app.post("/domains", status_code=201)
    async def create_domain(body: NewDomain) -> dict[str, Any]:
        domain = await service.create_domain(
            body.name,
            body.size,
            body.active,
            body.backups,
            body.replication,
            body.listen,
            body.failback,
            body.accept_loss,
            body.no_leg,
        )
        return await domain_view(service, domain)

    @app.get("/domains/{name}")
    async def show_domain(
        name: str,
        version: int | None = Query(default=None, ge=0, le=2**62),
        wait_s: float = Query(default=0.0, ge=0, le=POLL_MAX_S),
    ) -> dict[str, Any]:
        """A domain; when ``version`` (of an earlier answer) is given, waits until something has changed."""
        if version is not None:
            await service.wait_change(version, wait_s)
        seen = service.version
        return {**await domain_view(service, service.store.domain(name)), "version": seen}

    @app.delete("/domains/{name}")
    async def remove_domain(name: str, force: bool = False) -> dict[str, Any]:
        await service.remove_domain(name, force=force)
        return {}

    @app.post("/domains/{name}/start")
    async def start_domain(name: str) -> dict[str, Any]:
        await service.start_domain(name)
        return await domain_view(service, service.store.domain(name))

    @app.post("/domains/{name}/stop")
    async def stop_domain(name: str, force: bool = False) -> dict[str, Any]:
        await service.stop_domain(name, force=force)
        return await domain_view(service, service.store.domain(name))

    @app.post("/domains/{name}/failover")
    async def fail_over(name: str, body: Target) -> dict[str, Any]:
        return await domain_view(
            service, await service.fail_over(name, body.to, accept_loss=body.accept_loss)
        )

    @app.get("/domains/{name}/losses")
    async def list_losses(name: str) -> list[dict[str, Any]]:
        """What the last failover that has lost anything has lost, by disk and offset, all of it."""
        return [asdict(one) for one in service.losses(name)]

    @app.post("/domains/{name}/verify")
    async def verify(name: str, body: Verify) -> dict[str, Any]:
        return await domain_view(service, await service.verify(name, body.rate, repair=body.repair))

    @app.post("/domains/{name}/verify/stop")
    async def stop_verify(name: str) -> dict[str, Any]:
        return await domain_view(service, await service.stop_verify(name))

    @app.post("/domains/{name}/failback")
    async def fail_back(name: str, body: Nothing | None = None) -> dict[str, Any]:
        return await domain_view(service, await service.fail_back(name))

    @app.post("/domains/{name}/hold")
    async def hold_domain(name: str, body: Hold) -> dict[str, Any]:
        return await domain_view(service, await service.hold_domain(name, body.timeout_s))

    @app.post("/domains/{name}/release")
    async def release_domain(name: str, body: Nothing | None = None) -> dict[str, Any]:
        return await domain_view(service, await service.release_domain(name))

    @app.post("/domains/{name}/migrate")
    async def migrate(name: str, body: Move) -> dict[str, Any]:
        return await domain_view(service, await service.migrate(name, body.to, body.replace))

    @app.post("/domains/{name}/legs", status_code=201)
    async def add_leg(name: str, body: NewLeg) -> dict[str, Any]:
        return await domain_view(service, await service.add_leg(name, body.group))

    @app.delete("/domains/{name}/legs/{group}")
    async def remove_leg(name: str, group: str) -> dict[str, Any]:
        return await domain_view(service, await service.remove_leg(name, group))

    @app.post("/domains/{name}/set")
    async def set_domain(name: str, body: Policies) -> dict[str, Any]:
        changed = service.set_domain(
            name, failback=body.failback, accept_loss=body.accept_loss, no_leg=body.no_leg
        )
        return await domain_view(service, changed)

    @app.post("/domains/{name}/resync")
    async def resync(name: str, body: Resync) -> dict[str, Any]:
        return {"groups": await service.resync(name, body.group, body.rate)}


def _add_disks(app: FastAPI, service: Service) -> None:
    async def view(domain: str, disk: str) -> dict[str, Any]:
        found = service.disk(domain, disk)
        supervisor = service.supervisors.get(domain)
        status = await supervisor.status() if supervisor is not None else None
        return disk_view(service.run_directory, service.store.domain(domain), found, status)

    @app.get("/disks")
    async def list_disks() -> list[dict[str, Any]]:
        return [
            disk_view(service.run_directory, domain, disk, None)
            for domain in service.store.domains()
            for disk in domain.disks
            if disk.ready
        ]

    @app.post("/domains/{domain}/disks", status_code=201)
    async def create_disk(domain: str, body: NewDisk) -> dict[str, Any]:
        await service.create_disk(domain, body.name, body.size)
        return await view(domain, body.name)

    @app.get("/domains/{domain}/disks/{disk}")
    async def show_disk(domain: str, disk: str) -> dict[str, Any]:
        return await view(domain, disk)

    @app.post("/domains/{domain}/disks/{disk}/resize")
    async def resize_disk(domain: str, disk: str, body: Size) -> dict[str, Any]:
        await service.resize_disk(domain, disk, body.size)
        return await view(domain, disk)

    @app.delete("/domains/{domain}/disks/{disk}")
    async def remove_disk(domain: str, disk: str, force: bool = False) -> dict[str, Any]:
        await service.remove_disk(domain, disk, force=force)
        return {}
