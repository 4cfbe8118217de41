"""``standfast disk``: virtual disks in domains."""

from typing import Annotated

import typer

from proxy.cli import render
from proxy.cli.client import Manager
from proxy.cli.objects import DiskObject
from proxy.cli.options import RUN_DEFAULT, Force, Json, Run, Size, branch
from proxy.cli.output import done, show
from proxy.sizes import format_size

app = branch("Virtual disks in domains: what a VM opens.")


def _check_name(text: str) -> str:
    domain, _, disk = text.partition("/")
    if not domain or not disk:
        raise typer.BadParameter(f"{text!r} is not DOMAIN/DISK, such as vol1/disk1")
    return text


DiskName = Annotated[
    str,
    typer.Argument(metavar="DOMAIN/DISK", callback=_check_name, help="The domain's name and the disk's."),
]


def _path(name: str) -> tuple[str, str, str, str]:
    domain, _, disk = name.partition("/")
    return ("domains", domain, "disks", disk)


@app.command()
def create(name: DiskName, size: Size, as_json: Json = False, run: Run = RUN_DEFAULT) -> None:
    """Make a disk, which reads as zeroes."""
    *place, disk_name = _path(name)
    disk: DiskObject = Manager(run).post(*place, body={"name": disk_name, "size": size})
    done(disk, f"disk {name} created: {format_size(disk['size'])} at {disk['nbd_uri']}", as_json=as_json)


@app.command("list")
def list_disks(
    domain: Annotated[str | None, typer.Argument(metavar="[DOMAIN]", help="Only this domain's.")] = None,
    as_json: Json = False,
    run: Run = RUN_DEFAULT,
) -> None:
    """List the disks."""
    manager = Manager(run)
    disks = manager.get("disks") if domain is None else manager.get("domains", domain)["disks"]
    show(disks, render.disks_table, as_json=as_json)


@app.command("show")
def show_disk(name: DiskName, as_json: Json = False, run: Run = RUN_DEFAULT) -> None:
    """Show a disk and its addresses."""
    show(Manager(run).get(*_path(name)), render.disk_page, as_json=as_json)


@app.command()
def resize(name: DiskName, size: Size, as_json: Json = False, run: Run = RUN_DEFAULT) -> None:
    """Grow a disk; clients see the new size when they connect anew."""
    disk: DiskObject = Manager(run).post(*_path(name), "resize", body={"size": size})
    done(disk, f"disk {name} has {format_size(disk['size'])} now", as_json=as_json)


@app.command()
def remove(name: DiskName, force: Force = False, as_json: Json = False, run: Run = RUN_DEFAULT) -> None:
    """Remove a disk and what is on it."""
    answer = Manager(run).delete(*_path(name), force=force)
    done(answer, f"disk {name} removed", as_json=as_json)
