"""The manager's config file: what it may say, and one clear line for everything else."""

from pathlib import Path

import pytest

from proxy.errors import InvalidError
from proxy.manager.settings import Settings, load_settings


def test_settings_none_given_are_the_defaults() -> None:
    assert load_settings(None) == Settings()


def test_settings_given_are_taken_and_the_rest_default(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text("deadline_ms = 800\nquarantine_s = 1\n")
    assert load_settings(path) == Settings(deadline_ms=800, quarantine_s=1)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("deadline_ms = ", "not TOML"),
        ("deadline_ms = 9", "from 10 to"),
        ("deadline_ms = 100.5", "from 10 to"),
        ("deadline_ms = true", "from 10 to"),
        ("deadline_ms = '5'", "from 10 to"),
        ("quarantine_s = -1", "from 0 to"),
        ("[deadline_ms]\na = 1", "from 10 to"),
        ("read_repairs_max = -1", "from 0 to"),
        ("read_repairs_window_s = 0", "from 1 to"),
        ("patience = 5", "unknown setting patience"),
    ],
)
def test_settings_bad_are_refused_in_one_line(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "config.toml"
    path.write_text(text)
    with pytest.raises(InvalidError, match=said) as refused:
        load_settings(path)
    assert "\n" not in str(refused.value)


def test_settings_file_missing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidError, match="cannot be read"):
        load_settings(tmp_path / "nothing.toml")
