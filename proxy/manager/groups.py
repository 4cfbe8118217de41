"""Making a group: every device is looked at before any is written to, and what fails is undone."""

import os
from collections.abc import Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from uuid import UUID, uuid4

import trio

from backends import DeviceError, OpenDevice, parse_device_url
from backends.signature import foreign_signature
from proxy.errors import InvalidError, LabelError, RefusedError, StandfastError
from proxy.label import LABEL_SIZE, Label, LabelMissingError, check_label, data_offset_for, label_of
from proxy.model import BLOCK_SIZE_MAX, DeviceId, Group, GroupId, Layout, check_name
from proxy.model import Device as GroupDevice
from proxy.store import NewDevice, Store

#: The engine numbers the devices of a leg in the extent map; nobody has asked for more.
DEVICES_MAX = 256


@dataclass(slots=True)
class _Candidate:
    """A device about to be labelled. ``before``: what stood where its label goes."""

    url: str
    device: OpenDevice
    before: bytes
    new: NewDevice


async def create_group(
    store: Store, name: str, urls: Sequence[str], layout: Layout, *, force: bool, at: float
) -> Group:
    """Label the devices and record the group.

    Args:
        urls: in the order of the group.
        force: label devices that carry something already.
        at: the time, in seconds since the epoch.

    Raises:
        StandfastError: something is not as it should be; every device is as it was, and a file that
            was made for the group is gone again.
    """
    check_name("group", name)
    if not 1 <= len(urls) <= DEVICES_MAX:
        raise InvalidError(f"a group has 1 to {DEVICES_MAX} devices, not {len(urls)}")
    if name in {group.name for group in store.groups()}:
        raise RefusedError(f"there is a group {name} already")
    async with AsyncExitStack() as opened:
        made = [path for path in map(_local_file, urls) if path is not None and _is_absent(path)]
        written: list[_Candidate] = []
        try:
            candidates = await _look_at(store, urls, opened, force=force)
            group = _group_of(name, layout, candidates)
            for candidate, device in zip(candidates, group.devices, strict=True):
                written.append(candidate)
                label = label_of(group, device, map_generation=0)
                await _write(candidate, label.encode())
            for candidate, device in zip(candidates, group.devices, strict=True):
                await _check_written(candidate, device.uuid)
            return store.add_group(name, group.uuid, layout, [candidate.new for candidate in candidates], at)
        except BaseException as error:
            with trio.CancelScope(shield=True):
                for candidate in written:
                    with suppress(DeviceError):
                        await _write(candidate, candidate.before)
                for path in made:
                    with suppress(FileNotFoundError):
                        os.unlink(path)
            if isinstance(error, DeviceError):
                raise RefusedError(str(error)) from error
            raise


def _local_file(url: str) -> str | None:
    """The path of a device that opening may create, or None."""
    try:
        location = parse_device_url(url)
    except DeviceError as error:
        raise InvalidError(str(error)) from error
    if not location.shareable:
        raise InvalidError(f"{url}: lives within one process, and a group's devices are reached from several")
    path = getattr(location, "path", None)
    return path if isinstance(path, str) else None


def _is_absent(path: str) -> bool:
    try:
        os.lstat(path)
    except FileNotFoundError:
        return True
    except OSError as error:
        raise InvalidError(f"{path}: {error.strerror}") from error
    return False


async def _look_at(
    store: Store, urls: Sequence[str], opened: AsyncExitStack, *, force: bool
) -> list[_Candidate]:
    """Open every device and make sure it may be taken."""
    known = {device.uuid: group.name for group in store.groups() for device in group.devices}
    seen: dict[object, str] = {}
    candidates = []
    for url in urls:
        device = await opened.enter_async_context(await parse_device_url(url).open(create=True))
        identity = _identity(device)
        if identity in seen:
            raise InvalidError(f"{url}: is the same device as {seen[identity]}")
        seen[identity] = url
        if device.info.block_size > BLOCK_SIZE_MAX:
            raise RefusedError(
                f"{url}: has blocks of {device.info.block_size} bytes; {BLOCK_SIZE_MAX} is the most"
            )
        before = await device.read(0, min(LABEL_SIZE, device.info.size))
        data_offset = data_offset_for(device.info.size, url=url)
        await _check_content(device, before, known, force=force)
        new = NewDevice(uuid4(), device.info.size, data_offset, url)
        candidates.append(_Candidate(url, device, before, new))
    return candidates


def _identity(device: OpenDevice) -> object:
    """What two URLs of one device have in common."""
    if device.local_path is None:
        return device.url
    status = os.stat(device.local_path)
    return (status.st_rdev,) if status.st_rdev else (status.st_dev, status.st_ino)


async def _check_content(device: OpenDevice, head: bytes, known: dict[UUID, str], *, force: bool) -> None:
    """Refuse a device that carries something, unless forced; one of a group of ours in any case."""
    try:
        label = Label.decode(head, url=device.url)
    except LabelMissingError:
        if force:
            return
        signature = await foreign_signature(device)
        if signature is not None:
            raise RefusedError(f"{device.url}: carries {signature}; say --force to lose it") from None
    except LabelError as error:
        if not force:
            raise RefusedError(f"{error}; say --force to use the device all the same") from None
    else:
        if label.device_uuid in known:
            raise RefusedError(
                f"{device.url}: is a device of group {known[label.device_uuid]}; remove that first"
            )
        if not force:
            raise RefusedError(
                f"{device.url}: carries the label of group {label.group_name}, which this manager does not know; "
                "say --force to lose what is on it"
            )


def _group_of(name: str, layout: Layout, candidates: Sequence[_Candidate]) -> Group:
    """The group as its labels describe it; its ids are the store's to give."""
    return Group(
        GroupId(0),
        uuid4(),
        name,
        layout,
        tuple(
            GroupDevice(DeviceId(0), one.new.uuid, position, one.new.size, one.new.data_offset, one.url)
            for position, one in enumerate(candidates)
        ),
    )


async def _check_written(candidate: _Candidate, uuid: UUID) -> None:
    """Refuse a device that another URL reaches too: that one's label has taken the place of this one's."""
    with suppress(LabelError):
        if Label.decode(await candidate.device.read(0, LABEL_SIZE), url=candidate.url).device_uuid == uuid:
            return
    raise RefusedError(
        f"{candidate.url}: its label was overwritten by that of another device of the group; is it named twice, or "
        "behind two of the URLs?"
    )


async def _write(candidate: _Candidate, data: bytes) -> None:
    await candidate.device.write(0, data)
    await candidate.device.flush()


async def accept_labels(store: Store, group: Group) -> int:
    """Take the labels of a group's devices for right although they are older, or newer, than the store says.

    Returns:
        The newest generation among them.

    Raises:
        RefusedError: a device cannot be reached, or is not the group's; nothing has changed.
    """
    generations = []
    for device in group.devices:
        try:
            async with await parse_device_url(device.url).open(create=False) as opened:
                label = Label.decode(await opened.read(0, LABEL_SIZE), url=device.url)
                expected = label_of(group, device, map_generation=label.map_generation)
                check_label(label, expected, least_generation=0, url=device.url, size=opened.info.size)
        except (DeviceError, LabelError) as error:
            raise RefusedError(str(error)) from error
        generations.append(label.map_generation)
    store.set_label_generations(group.id, min(generations), max(generations))
    return max(generations)


async def wipe_labels(group: Group) -> list[str]:
    """Take the labels off a group's devices, so that they can be used again; what could not be reached."""
    failures = []
    for device in group.devices:
        try:
            async with await parse_device_url(device.url).open(create=False) as opened:
                label = Label.decode(await opened.read(0, LABEL_SIZE), url=device.url)
                if label.device_uuid == device.uuid:
                    await opened.write(0, bytes(LABEL_SIZE))
                    await opened.flush()
        except (DeviceError, StandfastError) as error:
            failures.append(str(error))
    return failures
