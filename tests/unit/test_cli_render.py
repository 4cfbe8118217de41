"""What people see: whole addresses for programs, no codes where there is no terminal, nobody's escapes."""

import re
from collections.abc import Sequence
from typing import Any

import pytest
from rich.console import RenderableType

from proxy.cli import render
from proxy.cli.output import Surface, lay_out
from proxy.cli.plan import plan_failover
from proxy.cli.text import count, printable
from proxy.cli.verifying import check_verified
from proxy.errors import RefusedError
from tests.unit.cli_objects import disk, domain, event, group, leg, sync_of

LONG_NAME = "d" * 63
LONG_URI = f"nbd+unix:///{LONG_NAME}?socket=/a/very/deep/place/" + "x" * 200


def lines(content: RenderableType, surface: Surface | None = None) -> list[str]:
    return lay_out(content, surface or Surface()).splitlines()


def test_disks_table_for_a_program_cuts_and_folds_nothing() -> None:
    page = lines(render.disks_table([disk(LONG_NAME, nbd_uri=LONG_URI)]))
    assert page[0].split() == ["DISK", "SIZE", "ADDRESS"]
    assert page[1].split() == [f"vol1/{LONG_NAME}", "1M", LONG_URI]


def test_disks_table_on_a_narrow_terminal_folds_and_loses_nothing() -> None:
    page = lines(render.disks_table([disk(nbd_uri=LONG_URI)]), Surface(width=60))
    assert all(len(line) <= 60 for line in page)
    assert "".join(line[len("vol1/disk1  ") :].strip() for line in page[1:]).endswith("x" * 200)


@pytest.mark.parametrize(
    "page",
    [
        render.groups_table([group()]),
        render.group_page(group()),
        render.domains_table([]),
        render.domain_page(domain(disks=[disk()])),
        render.disk_page(disk()),
        render.plan_page(plan_failover(domain(), None)),
        render.event_line(event(1, severity="error")),
        render.status_page({"ready": True, "pid": 1, "run": "/r", "domains": [], "last_event": 0}),
    ],
)
def test_pages_without_a_terminal_have_no_codes_and_no_blanks_at_line_ends(page: RenderableType) -> None:
    text = lay_out(page, Surface())
    assert text
    assert text.isascii()
    assert "\x1b" not in text
    assert all(line == line.rstrip() for line in text.splitlines())


def test_states_on_a_colour_terminal_are_coloured() -> None:
    assert "\x1b[32monline" in lay_out(render.domain_page(domain()), Surface(width=100, color=True))


def test_group_page_shows_brackets_of_a_url_as_they_are() -> None:
    device = {"position": 0, "url": "nbd://[::1]:10809/[red]x", "size": 1 << 20}
    assert "nbd://[::1]:10809/[red]x" in lay_out(render.group_page(group(devices=[device])), Surface())


def test_event_line_writes_escape_sequences_of_others_as_text() -> None:
    (line,) = lines(render.event_line(event(3, "a\x1b[2Jb\nc")))
    assert line.endswith(r"a\x1b[2Jb c")


def test_domain_page_shows_what_an_operator_looks_for() -> None:
    page = lines(
        render.domain_page(
            domain(
                leg("alpha", "active"),
                leg("beta", "backup", "syncing", dirty_bytes=1 << 19, sync=sync_of(1, 2)),
                leg("gamma", "backup", "outdated", blocked=True),
                state="degraded",
                trouble="clients wait",
                listen="127.0.0.1:10809",
                disks=[disk()],
                last_failover={
                    "at": "2026-01-02T03:04:05.678+00:00",
                    "reason": "ordered by the operator",
                    "stall_ms": 12.34,
                    "from": "gamma",
                    "to": "alpha",
                    "replayed": 1,
                    "lost_bytes": 0,
                    "generation": 4,
                },
            )
        )
    )
    words = [line.split() for line in page]
    assert ["domain", "vol1:", "degraded"] in words
    assert ["listen", "127.0.0.1:10809"] in words
    assert ["beta", "backup", "syncing", "512K", "0", "50%", "(1", "of", "2)", "-"] in words
    assert ["gamma", "backup", "outdated,", "blocked", "0", "0", "-", "-"] in words
    assert "  trouble      clients wait" in page
    assert (
        "  failover     2026-01-02T03:04:05.678+00:00 from gamma to alpha, stalled 12.3 ms, "
        "1 request replayed: ordered by the operator"
    ) in page


def test_domain_page_right_after_a_failover_leaves_out_what_is_not_known_yet() -> None:
    receipt: dict[str, Any] = {
        "at": "now",
        "reason": "why",
        "stall_ms": None,
        "from": "a",
        "to": "b",
        "replayed": None,
        "lost_bytes": 0,
        "generation": 2,
    }
    assert "now from a to b: why" in lay_out(render.domain_page(domain(last_failover=receipt)), Surface())


FOUND: dict[str, Any] = {
    "at": "2026-01-02T03:04:05.678+00:00",
    "outcome": "complete",
    "seconds": 1.5,
    "repair": True,
    "total": 1 << 20,
    "compared": 1 << 19,
    "mismatched": 8192,
    "repaired": 4096,
    "unreadable": 1 << 18,
    "unlisted": 4096,
    "mismatches": [{"group": "beta", "disk": "disk1", "offset": 4096, "length": 4096}],
}


def test_domain_page_shows_the_last_verify_or_how_far_the_present_one_is() -> None:
    page = lay_out(render.domain_page(domain(last_verify=FOUND)), Surface())
    assert "05.678+00:00 complete, 512K compared, 8K differ, 4K repaired, 256K not readable" in page
    progress = {**FOUND, "mismatched": 0, "unreadable": 0, "rate": 1 << 18, "seconds_left": 2.0}
    page = lay_out(render.domain_page(domain(verify=progress, last_verify=FOUND)), Surface())
    assert "50% (512K of 1M, 256K/s, 2 s left); no difference" in page
    assert "none yet" in lay_out(render.domain_page(domain()), Surface())


def test_verify_page_lists_differences_by_disk_and_counts_those_not_listed() -> None:
    page = [line.split() for line in lines(render.verify_page(FOUND))]  # type: ignore[arg-type]
    assert ["disk1", "4096", "4096", "beta"] in page
    assert ["4K", "more"] in page


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"outcome": "interrupted"}, "legs changed in the middle"),
        ({"outcome": "stopped"}, "it was stopped"),
        ({"outcome": "failed"}, "standfast events"),
        ({}, "differ from its active leg in 4K; look at the devices"),
        ({"repair": False, "repaired": 0}, "in 8K; repair it with: standfast verify vol1 --repair"),
        ({"repaired": 8192}, "could not read 256K"),
    ],
)
def test_verify_that_does_not_leave_equal_legs_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(RefusedError, match=re.escape(said)):
        check_verified("vol1", {**FOUND, **changes})  # type: ignore[typeddict-item]


def test_verify_that_leaves_equal_legs_is_fine() -> None:
    check_verified("vol1", {**FOUND, "repaired": 8192, "unreadable": 0})  # type: ignore[typeddict-item]


def test_domain_page_shows_the_first_extents_and_counts_the_others() -> None:
    extents = [{"offset": n, "length": 1, "device": 0, "device_offset": n} for n in range(64)]
    page = lines(render.domain_page(domain(leg("alpha", "active", extents=extents, extent_count=1000))))
    assert sum(line.startswith("alpha ") and line.split()[-3] == "1" for line in page) == render.EXTENTS_SHOWN
    assert page[-1] == f"alpha: {1000 - render.EXTENTS_SHOWN} more"


def test_domain_page_of_a_leg_that_is_not_open_has_no_error_counts() -> None:
    device = {"position": 0, "url": "file:///a", "size": 1 << 20}
    page = lines(render.domain_page(domain(leg("alpha", "active", devices=[device]))))
    assert ["alpha", "0", "1M", "-", "-", "file:///a"] in [line.split() for line in page]


def test_domains_table_shows_every_backup_with_its_state() -> None:
    shown: Any = [
        {
            "name": "vol1",
            "state": "online",
            "size": 1 << 20,
            "map_generation": 5,
            "active": "alpha",
            "legs": [leg("alpha", "active"), leg("beta", "backup"), leg("gamma", "backup", "outdated")],
            "disks": 1,
        }
    ]
    assert lines(render.domains_table(shown))[1].split() == [
        *("vol1", "online", "1M", "alpha", "beta:uptodate,", "gamma:outdated", "1", "5")
    ]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain", "plain"),
        ("two\nlines\tand  blanks", "two lines and blanks"),
        ("\x1b]0;title\x07", r"\x1b]0;title\x07"),
        ("caf\u00e9", "caf\u00e9"),
        ("\u202egnp", r"\u202egnp"),
    ],
)
def test_printable_is_one_line_without_control_characters(text: str, shown: str) -> None:
    assert printable(text) == shown


@pytest.mark.parametrize(("number", "shown"), [(0, "0 devices"), (1, "1 device"), (2, "2 devices")])
def test_count_says_one_and_many(number: int, shown: Sequence[str]) -> None:
    assert count(number, "device") == shown
