"""A leg that hangs while nobody asks it for anything: found by its probes, on real servers."""

import shutil
import signal

import pytest

from tests.integration.site import site
from tests.integration.test_failover import QUICK
from tests.integration.test_resync import is_online

pytestmark = pytest.mark.skipif(shutil.which("nbdkit") is None, reason="nbdkit is not installed")


@pytest.mark.parametrize(("device", "active"), [("alpha2", "beta"), ("beta1", "alpha")])
async def test_device_that_hangs_is_found_although_no_client_is_there(device: str, active: str) -> None:
    group = device[:-1]
    async with site(settings=QUICK + "probe_interval_s = 0.2\n") as made:
        await made.make()
        await made.stop_device(device)
        shown = await made.wait("vol1", lambda shown: shown["state"] == "degraded")
        leg = next(leg for leg in shown["legs"] if leg["group"] == group)
        assert (leg["state"], shown["active"]) == ("outdated", active)
        assert any(f"{device}.sock did not answer in time" in one for one in await made.events())
        made.devices[device].send_signal(signal.SIGCONT)
        await made.order("POST", "/domains/vol1/resync")
        await is_online(made)
