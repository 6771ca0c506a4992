"""Deadlines, and failures told at once: a run that hangs or is cut short has named its culprits."""

import pytest

SOAK_SECONDS = 3 * 3600


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The big counts have hours where the others have the minutes of pyproject.toml."""
    for item in items:
        if item.get_closest_marker("soak") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(SOAK_SECONDS))


class ToldAtOnce:
    """Prints a failed test's name and reason when it happens, not after the last test."""

    def __init__(self, terminal: pytest.TerminalReporter) -> None:
        self.terminal = terminal

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            reason = (crash.message if crash else report.longreprtext)[:300]
            self.terminal.ensure_newline()
            self.terminal.write_line(f"{report.nodeid}: {report.when} failed: {reason}")


@pytest.hookimpl(trylast=True)  # after the terminal reporter itself
def pytest_configure(config: pytest.Config) -> None:
    terminal = config.pluginmanager.get_plugin("terminalreporter")
    if terminal is not None:
        config.pluginmanager.register(ToldAtOnce(terminal), "told-at-once")
