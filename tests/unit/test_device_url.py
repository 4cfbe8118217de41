"""Device URLs: each well-formed one is understood, each malformed one gives one clear line."""

import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends import SCHEMES, DeviceUrlError, Location, parse_device_url
from backends.block import BlockLocation
from backends.file import Cache, FileLocation
from backends.memory import MemoryLocation
from backends.nbd import NbdLocation, TcpEndpoint, UnixEndpoint

MIB = 1 << 20


@pytest.mark.parametrize(
    ("url", "location"),
    [
        ("file:///srv/a.img", FileLocation("", "/srv/a.img", None, Cache.AUTO)),
        ("FILE:///srv/a.img", FileLocation("", "/srv/a.img", None, Cache.AUTO)),
        ("file:///srv/a.img?", FileLocation("", "/srv/a.img", None, Cache.AUTO)),
        ("file:/srv/a.img", FileLocation("", "/srv/a.img", None, Cache.AUTO)),
        ("file:///srv/a.img?size=50M", FileLocation("", "/srv/a.img", 50 * MIB, Cache.AUTO)),
        ("file:///srv/a.img?size=1.5k&cache=direct", FileLocation("", "/srv/a.img", 1536, Cache.DIRECT)),
        ("file:///a?cache=buffered&size=2T", FileLocation("", "/a", 2 << 40, Cache.BUFFERED)),
        ("file:///a+b%20c%23d%3fe%25?size=3G", FileLocation("", "/a+b c#d?e%", 3 << 30, Cache.AUTO)),
        ("file:///srv/gerät.img", FileLocation("", "/srv/gerät.img", None, Cache.AUTO)),
        ("block:///dev/disk/by-id/wwn-0x5", BlockLocation("", "/dev/disk/by-id/wwn-0x5")),
        ("nbd://store1/vol", NbdLocation("", "vol", TcpEndpoint("store1", 10809))),
        ("nbd://store1:10810/vol", NbdLocation("", "vol", TcpEndpoint("store1", 10810))),
        ("nbd://[fd00::1]:10810/vol", NbdLocation("", "vol", TcpEndpoint("fd00::1", 10810))),
        ("nbd://[::1]/", NbdLocation("", "", TcpEndpoint("::1", 10809))),
        ("nbd://store1", NbdLocation("", "", TcpEndpoint("store1", 10809))),
        ("nbd://store1//a/b%2Fc", NbdLocation("", "/a/b/c", TcpEndpoint("store1", 10809))),
        ("nbd+unix:///vol?socket=/run/a+b.sock", NbdLocation("", "vol", UnixEndpoint("/run/a+b.sock"))),
        ("nbd+unix:///?socket=/run/a%3db", NbdLocation("", "", UnixEndpoint("/run/a=b"))),
        ("nbd+unix:///?socket=/" + "s" * 106, NbdLocation("", "", UnixEndpoint("/" + "s" * 106))),
        ("memory:scratch?size=4k", MemoryLocation("", "scratch", 4096)),
        ("memory:scratch", MemoryLocation("", "scratch", None)),
    ],
)
def test_device_url_well_formed_is_understood(url: str, location: Location) -> None:
    expected: Location = replace(location, url=url)  # type: ignore[type-var]

    assert parse_device_url(url) == expected


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("", "no scheme"),
        ("/dev/sda", "no scheme"),
        ("disk.img", "no scheme"),
        ("iscsi//portal", "no scheme"),
        ("://x", "no scheme"),
        ("ftp://host/x", "unknown scheme 'ftp'; known are block, file, memory, nbd, nbd+unix"),
        ("nbds://host/x", "unknown scheme 'nbds'"),
        ("file:///a\nb", "control character"),
        ("file:///a\tb", "control character"),
        ("file:///a%zz", "two hexadecimal digits"),
        ("file:///a%", "two hexadecimal digits"),
        ("file:///a%ff", "not UTF-8"),
        ("file:///a\udcff", "not UTF-8"),
        ("file:///a%00b", "zero byte"),
        ("file:///a?size=%00", "zero byte"),
        ("file:///a#b", "%23"),
        ("file:///a#", "%23"),
        ("file:srv/a.img", "absolute path"),
        ("file:", "absolute path"),
        ("file://", "absolute path"),
        ("file:///", "directory"),
        ("file:///srv/", "directory"),
        ("file://srv/a.img", "names a host, 'srv'"),
        ("file:///a?size", "malformed parameter 'size'"),
        ("file:///a?size=", "malformed parameter 'size='"),
        ("file:///a?=5M", "malformed parameter '=5M'"),
        ("file:///a?size=5M&", "malformed parameter ''"),
        ("file:///a?size=5M&size=6M", "twice"),
        ("file:///a?size=fifty", "size 'fifty' is not a number"),
        ("file:///a?size=-5M", "size '-5M' is not a number"),
        ("file:///a?size=0", "larger than zero"),
        ("file:///a?size=1.3", "whole number"),
        ("file:///a?size=9000000T", "larger than"),
        ("file:///a?sise=5M", "unknown parameter 'sise'; it knows size, cache"),
        ("file:///a?cache=none", "cache 'none'; it can be direct or buffered"),
        ("file:///a?cache=auto", "cache 'auto'; it can be direct or buffered"),
        ("block:///dev/sda?size=5M", "unknown parameter 'size'; it takes none"),
        ("block:sda", "absolute path"),
        ("block://dev/sda", "names a host, 'dev'"),
        ("nbd:///vol", "needs a host"),
        ("nbd:store1:10809", "needs a host"),
        ("nbd://:10809/vol", "needs a host"),
        ("nbd://store1:0/vol", "port 0"),
        ("nbd://store1:65536/vol", "malformed: Port out of range"),
        ("nbd://store1:http/vol", "malformed: Port could not be cast"),
        ("nbd://[fd00::1/vol", "malformed: Invalid IPv6"),
        ("nbd://root:secret@store1/vol", "user name"),
        ("nbd://store1/vol?socket=/run/x", "unknown parameter 'socket'"),
        ("nbd://store1/" + "n" * 4097, "longer than 4096 bytes"),
        ("nbd+unix:///vol", "absolute path of a socket"),
        ("nbd+unix:///vol?socket=run/x", "absolute path of a socket"),
        ("nbd+unix://host/vol?socket=/run/x", "names a host, 'host'"),
        ("nbd+unix:///vol?socket=/" + "s" * 107, "108 bytes; the system allows 107"),
        ("nbd+unix:///vol?socket=/" + "ü" * 54, "109 bytes; the system allows 107"),
        ("memory:", "needs a name"),
        ("memory:a/b", "needs a name"),
        ("memory://a", "needs a name"),
        ("memory:a?cache=direct", "unknown parameter 'cache'; it knows size"),
    ],
)
def test_device_url_malformed_gives_one_line_that_names_it(url: str, words: str) -> None:
    with pytest.raises(DeviceUrlError) as caught:
        parse_device_url(url)

    message = str(caught.value)
    assert repr(url) in message
    assert words in message
    assert "\n" not in message


@given(st.one_of(st.text(), st.builds("{}:{}".format, st.sampled_from(sorted(SCHEMES)), st.text())))
def test_device_url_of_any_text_is_understood_or_refused(text: str) -> None:
    try:
        outcome = parse_device_url(text).url
    except DeviceUrlError as error:
        outcome = str(error)

    assert outcome == text or (repr(text) in outcome and "\n" not in outcome)


@pytest.mark.parametrize("scheme", sorted(SCHEMES))
def test_device_url_only_of_memory_is_not_shareable(scheme: str) -> None:
    examples = {
        "block": "block:///dev/sda",
        "file": "file:///a",
        "memory": "memory:a",
        "nbd": "nbd://host/",
        "nbd+unix": "nbd+unix:///?socket=/a",
    }

    assert parse_device_url(examples[scheme]).shareable is (scheme != "memory")


def test_backends_imported_for_its_pure_leaves_loads_no_trio() -> None:
    program = "import sys, proxy.sizes, backends; sys.exit('trio' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
