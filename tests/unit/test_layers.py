"""The rules of the layout: pure modules do no I/O, and backends know nothing of domains."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

PURE = [
    "proxy/allocator.py",
    "proxy/errors.py",
    "proxy/extentmap.py",
    "proxy/failover.py",
    "proxy/label.py",
    "proxy/model.py",
    "proxy/sizes.py",
    "proxy/wire.py",
    "proxy/domainserver/negotiation.py",
    "proxy/manager/maps.py",
    "proxy/manager/messages.py",
    "backends/nbdnegotiation.py",
    "backends/nbdcommand.py",
    "backends/nbdproto.py",
    "backends/sizes.py",
]
IMPURE = {"trio", "socket", "os", "time", "subprocess", "asyncio", "threading", "select", "fcntl", "sqlite3"}


def imports(path: Path) -> set[str]:
    """The modules a file imports, whole names."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


@pytest.mark.parametrize("module", PURE)
def test_pure_module_imports_no_io(module: str) -> None:
    assert not {name.split(".")[0] for name in imports(ROOT / module)} & IMPURE


@pytest.mark.parametrize("module", sorted(path.name for path in (ROOT / "backends").glob("*.py")))
def test_backend_never_imports_proxy(module: str) -> None:
    assert not [name for name in imports(ROOT / "backends" / module) if name.split(".")[0] == "proxy"]


def test_pure_core_loads_neither_trio_nor_sockets() -> None:
    code = (
        "import sys, proxy.failover, proxy.extentmap, proxy.allocator, proxy.label\n"
        "sys.exit(bool({'trio', 'socket', 'fastapi', 'httpx'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
