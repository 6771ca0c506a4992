"""Configuration: precedence, strictness, sizes."""

from pathlib import Path

import pytest

from imagecache.errors import CubecacheError, Denied, UsageError
from imagecache.settings import SETTINGS, load_settings, parse_size, reloaded

pytestmark = pytest.mark.quick


def test_flags_over_environment_over_file(tmp_path: Path) -> None:
    config = tmp_path / "c.toml"
    config.write_text('state_dir = "/f"\nstore = "file:///f"\nrealm = "f"\n')
    environment = {"CUBECACHE_STATE_DIR": "/e", "CUBECACHE_STORE": "file:///e"}
    only_file = load_settings({}, config=config)
    assert (only_file.state_dir, only_file.store_url, only_file.realm) == (
        Path("/f"),
        "file:///f",
        "f",
    )
    both = load_settings(environment, config=config)
    assert (both.state_dir, both.store_url, both.realm) == (Path("/e"), "file:///e", "f")
    flags = load_settings(environment, config=config, state_dir=Path("/x"), store="file:///x")
    assert (flags.state_dir, flags.store_url) == (Path("/x"), "file:///x")
    assert load_settings({}, state_dir=Path("/x")).store_url == "file:///x/store"


def test_sections_are_typed(tmp_path: Path) -> None:
    config = tmp_path / "c.toml"
    config.write_text(
        '[cache]\nbudget_bytes = "5GiB"\nfill = "hot"\nstall_seconds = 3\n'
        '[store]\nurl = "file:///s"\ntier_url = "http://cache"\n'
        '[registry]\nplain_http = ["r:5000"]\n[nbd]\ntcp = "127.0.0.1:10809"\n'
    )
    settings = load_settings({}, config=config, state_dir=tmp_path)
    assert settings.cache.budget_bytes == 5 << 30
    assert settings.cache.stall_seconds == 3.0
    assert (settings.store_url, settings.store.tier_url) == ("file:///s", "http://cache")
    assert settings.registry.plain_http == ("r:5000",)


@pytest.mark.parametrize(
    "text",
    [
        "nonsense = 1",
        "[cache]\nbugdet_bytes = 1",
        "[cache]\nbudget_bytes = -1",
        '[cache]\nbudget_bytes = "5 apples"',
        '[cache]\nfill = "some"',
        '[cache]\nintegrity = "never"',
        "[build]\nlevel = 99",
        "[registry]\nplain_http = [1]",
        '[nbd]\ntcp = "nowhere"',
        "cache = 3",
        'realm = "UPPER"',
        "not toml",
    ],
)
def test_every_mistake_is_a_usage_error(tmp_path: Path, text: str) -> None:
    """J10: an unknown key, a wrong type or an unusable value refuses the start by name."""
    config = tmp_path / "c.toml"
    config.write_text(text)
    with pytest.raises(UsageError):
        load_settings({}, config=config, state_dir=tmp_path)


def test_unusable_files_are_refused(tmp_path: Path) -> None:
    """J10: a world-writable file, a missing one, a directory."""
    config = tmp_path / "c.toml"
    config.write_text("")
    config.chmod(0o666)
    with pytest.raises(Denied):
        load_settings({}, config=config)
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(CubecacheError):
            load_settings({}, config=path)


def test_too_long_state_directory_is_refused_before_a_socket_fails(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unix socket"):
        load_settings({}, state_dir=tmp_path / ("d" * 100))


def test_sizes() -> None:
    assert parse_size("3 MiB", "x") == 3 << 20
    assert parse_size(7, "x") == 7
    for bad in (True, -1, 1.5, "1.5GiB", "GiB", None):
        with pytest.raises(UsageError):
            parse_size(bad, "x")


def test_each_value_tells_where_it_comes_from(tmp_path: Path) -> None:
    config = tmp_path / "c.toml"
    config.write_text('[cache]\nbudget_bytes = "1GiB"\nstall_seconds = 5\n')
    environment = {
        "CUBECACHE_CACHE_STALL_SECONDS": "7.5",
        "CUBECACHE_REGISTRY_PLAIN_HTTP": "a:1,b:2",
        "CUBECACHE_API_PRIVATE_IMAGES": "true",
    }
    settings = load_settings(environment, config=config, state_dir=tmp_path)
    settings = settings.with_flag("cache.fill", "hot", "--fill")
    assert settings.cache.stall_seconds == 7.5
    assert settings.registry.plain_http == ("a:1", "b:2")
    assert settings.api.private_images
    assert settings.origin("cache.budget_bytes") == f"file {config}"
    assert settings.origin("cache.stall_seconds") == "environment CUBECACHE_CACHE_STALL_SECONDS"
    assert settings.origin("state_dir") == "flag --state-dir"
    assert settings.origin("cache.fill") == "flag --fill"
    assert settings.origin("build.level") == "default"
    assert settings == load_settings(environment, config=config, state_dir=tmp_path).with_flag(
        "cache.fill", "hot", "--fill"
    )


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("CUBECACHE_CACHE_BUDGET_BYTES", "much"),
        ("CUBECACHE_CACHE_STALL_SECONDS", "nan"),
        ("CUBECACHE_CACHE_STALL_SECONDS", "-1"),
        ("CUBECACHE_API_PRIVATE_IMAGES", "perhaps"),
        ("CUBECACHE_LOG_FORMAT", "xml"),
        ("CUBECACHE_API_TCP", "127.0.0.1:1"),
        ("CUBECACHE_API_TLS_KEY", "/k"),
    ],
)
def test_an_unusable_variable_refuses_the_start(tmp_path: Path, name: str, text: str) -> None:
    """J10: an environment override that is invalid."""
    with pytest.raises(UsageError):
        load_settings({name: text}, state_dir=tmp_path)


def test_reload_takes_what_it_can_and_names_the_rest(tmp_path: Path) -> None:
    before = load_settings({}, state_dir=tmp_path)
    after = load_settings(
        {"CUBECACHE_BUILD_LEVEL": "9", "CUBECACHE_CACHE_BUDGET_BYTES": "1"}, state_dir=tmp_path
    )
    merged, taken, left = reloaded(before, after)
    assert (taken, left) == (["build.level"], ["cache.budget_bytes"])
    assert (merged.build.level, merged.cache.budget_bytes) == (9, before.cache.budget_bytes)
    assert merged.origin("build.level") == "environment CUBECACHE_BUILD_LEVEL"


def test_the_table_of_settings_is_the_documented_one() -> None:
    """ARCHITECTURE.md's table has every setting, its variable-free name, default and reload."""
    text = (Path(__file__).parents[2] / "ARCHITECTURE.md").read_text()
    rows = {
        cells[0].strip("` "): (cells[1].strip("` "), cells[2].strip())
        for cells in (line.strip("|\n").split("|") for line in text.splitlines())
        if len(cells) == 4 and cells[0].strip().startswith("`")
    }
    for row in SETTINGS:
        default = "-" if row.default in (None, ()) else str(row.default)
        assert rows.get(row.name) == (default, "yes" if row.reload else ""), row.name
