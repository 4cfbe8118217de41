"""``standfast group``: ordered sets of devices."""

from typing import Annotated

import typer

from proxy.cli import render
from proxy.cli.client import Manager
from proxy.cli.objects import GroupObject
from proxy.cli.options import RUN_DEFAULT, GroupName, Json, Run, branch
from proxy.cli.output import done, show
from proxy.cli.text import count
from proxy.sizes import format_size

app = branch("Groups of devices.")


@app.command()
def create(
    name: GroupName,
    device: Annotated[
        list[str],
        typer.Option(metavar="URL", help="A device, such as file:///path?size=50M; once for each, in order."),
    ],
    layout: Annotated[
        str, typer.Option(metavar="LAYOUT", help="linear or striped[:CHUNK], such as striped:1M.")
    ] = "linear",
    force: Annotated[
        bool, typer.Option("--force", help="Take devices that carry something already.")
    ] = False,
    as_json: Json = False,
    run: Run = RUN_DEFAULT,
) -> None:
    """Make a group of devices, and label them."""
    body = {"name": name, "devices": device, "layout": layout, "force": force}
    group: GroupObject = Manager(run).post("groups", body=body)
    facts = (count(len(device), "device"), format_size(group["size"]), group["layout"])
    done(group, f"group {name} created: {', '.join(facts)}", as_json=as_json)


@app.command("list")
def list_groups(as_json: Json = False, run: Run = RUN_DEFAULT) -> None:
    """List the groups."""
    show(Manager(run).get("groups"), render.groups_table, as_json=as_json)


@app.command("show")
def show_group(name: GroupName, as_json: Json = False, run: Run = RUN_DEFAULT) -> None:
    """Show a group and its devices."""
    show(Manager(run).get("groups", name), render.group_page, as_json=as_json)


@app.command()
def accept(name: GroupName, as_json: Json = False, run: Run = RUN_DEFAULT) -> None:
    """Take a group's devices as they are, after the store or they were restored from a backup.

    Whichever leg is active by the store is served as it is then: be sure that it has the newest data.
    """
    answer = Manager(run).post("groups", name, "accept")
    done(answer, f"group {name} is accepted as it is, at generation {answer['generation']}", as_json=as_json)


@app.command()
def remove(name: GroupName, as_json: Json = False, run: Run = RUN_DEFAULT) -> None:
    """Forget a group, and take the labels off its devices."""
    answer = Manager(run).delete("groups", name)
    lines = [f"group {name} removed", *(f"its label is still there: {one}" for one in answer["unreached"])]
    done(answer, "\n".join(lines), as_json=as_json)
