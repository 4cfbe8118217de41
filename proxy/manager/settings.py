"""What an operator can set for a whole manager, from a TOML file (``standfast serve --config FILE``)."""

import tomllib
from dataclasses import dataclass, fields
from pathlib import Path

from proxy.dirtymap import REGION_SHIFT_DEFAULT, REGION_SHIFTS
from proxy.errors import InvalidError


@dataclass(frozen=True, slots=True)
class Settings:
    """Times and numbers, each with the reason for its default.

    Attributes:
        deadline_ms: how long a device may take for one operation before it counts as failed. A
            guest's disk gives up after 30 s and its file system notices nothing below; a healthy
            device, even a busy one, answers in less than a second.
        probe_interval_s: how long a device may be silent before it is asked for something, so that a hang is
            noticed also where nobody waits: this and ``deadline_ms`` later. 0: never.
        quarantine_s: how long a server whose connection broke with writes in flight is left alone
            after it can be reached again, before anything is written to it: NBD gives no proof
            that such writes are done with, so they are given time to be. A server alive enough to
            accept a connection has long worked off what it had received.
        reopen_interval_s: how often a held domain tries to reach its lost devices again.
        bitmap_region_kib: what one bit of a new dirty bitmap stands for, a power of two. Smaller, and
            less is copied after a crash; larger, and less is marked (``bench bitmap``).
        resync_rate_mib_s: what a resync may take at most; 0: all that the devices give.
        resync_floor_mib_s: what it takes while clients are at work. The default leaves a client that
            asks for one thing at a time its latency (``bench resync``), and ends all the same.
        backlog_kib: memory for what the backups of an asynchronous domain have yet to get; one for which
            that is not enough is caught up from the dirty bitmap. The default is half of what clients' requests
            may take, and some tenths of a second of what a fast network carries.
        catch_up_s: how long after such a leg fell out of step it is tried to bring it back, and between
            two tries: what was too much for it may be over by then.
        read_repairs_max: so many reads that a leg could not do are repaired from a backup within
            ``read_repairs_window_s``; with one more the leg counts as failed. A disk replaces a bad
            block now and then and lives on; one that goes on doing so is dying. 0: the first fails it.
        read_repairs_window_s: see above.
    """

    deadline_ms: int = 5000
    probe_interval_s: float = 1.0
    quarantine_s: float = 3.0
    reopen_interval_s: float = 1.0
    bitmap_region_kib: int = 1 << REGION_SHIFT_DEFAULT >> 10
    resync_rate_mib_s: int = 0
    resync_floor_mib_s: int = 32
    backlog_kib: int = 64 << 10
    catch_up_s: float = 5.0
    read_repairs_max: int = 16
    read_repairs_window_s: float = 3600.0


_LIMITS = {
    "deadline_ms": (10, 600_000),
    "probe_interval_s": (0, 3600),
    "quarantine_s": (0, 3600),
    "reopen_interval_s": (0.05, 3600),
    "bitmap_region_kib": (1 << REGION_SHIFTS[0] >> 10, 1 << REGION_SHIFTS[-1] >> 10),
    "resync_rate_mib_s": (0, 1_000_000),
    "resync_floor_mib_s": (1, 1_000_000),
    "backlog_kib": (64, 128 << 10),
    "catch_up_s": (0.1, 86_400),
    "read_repairs_max": (0, 1000),
    "read_repairs_window_s": (1, 30 * 86_400),
}


def load_settings(path: Path | None) -> Settings:
    """The settings in a file; defaults for what it does not name.

    Raises:
        InvalidError: it cannot be read, is no TOML, or sets something unknown or out of range.
    """
    if path is None:
        return Settings()
    try:
        given = tomllib.loads(path.read_text())
    except OSError as error:
        raise InvalidError(f"config file {path} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidError(f"config file {path} is not TOML: {error}") from None
    known = {field.name: field.type for field in fields(Settings)}
    for name, value in given.items():
        if name not in known:
            raise InvalidError(f"config file {path}: unknown setting {name}; known are {', '.join(known)}")
        low, high = _LIMITS[name]
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not (whole or (known[name] is float and isinstance(value, float))) or not low <= value <= high:
            raise InvalidError(
                f"config file {path}: {name} must be a number from {low} to {high}, not {value!r}"
            )
    settings = Settings(**given)
    if settings.bitmap_region_kib & (settings.bitmap_region_kib - 1):
        raise InvalidError(
            f"config file {path}: bitmap_region_kib must be a power of two, not {settings.bitmap_region_kib}"
        )
    return settings
