"""Growing a disk while somebody else has his hands on it."""

import shutil
from functools import partial

import pytest
import trio

from tests.integration.site import Site
from tests.integration.test_control_plane import slow_device, started, wait_in_flight

pytestmark = [
    pytest.mark.skipif(shutil.which("nbdkit") is None, reason="nbdkit is not installed"),
    pytest.mark.slow,
]

RESIZE = "/domains/vol1/disks/disk1/resize"


async def make(made: Site) -> None:
    """A domain on one device that takes its time to zero, and a small disk."""
    url = await slow_device(made, "alpha1", 50, write_ms=400)
    await made.order("POST", "/groups", name="alpha", devices=[url])
    await made.order("POST", "/domains", name="vol1", size="40M", active="alpha")
    await made.order("POST", "/domains/vol1/disks", name="disk1", size="1M")


async def test_disk_resized_while_it_is_resized_is_refused() -> None:
    async with started("deadline_ms = 5000\n") as made:
        await make(made)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(made.order, "POST", RESIZE, size="3M"))
            await wait_in_flight(made, alpha=1)
            assert "being resized already" in await made.refused("POST", RESIZE, size="5M")
        await made.order("POST", RESIZE, size="5M")
        assert (await made.show())["disks"][0]["size"] == 5 << 20


async def test_disk_removed_while_it_is_resized_is_gone_and_all_its_space_free() -> None:
    async with started("deadline_ms = 5000\n") as made:
        await make(made)
        async with trio.open_nursery() as nursery:
            refusal = partial(made.refused, "POST", RESIZE, size="30M")
            nursery.start_soon(refusal)
            await wait_in_flight(made, alpha=1)
            await made.order("DELETE", "/domains/vol1/disks/disk1")
        shown = await made.show()
        assert (shown["state"], shown["disks"]) == ("online", [])
        await made.order("POST", "/domains/vol1/disks", name="disk1", size="40M")
