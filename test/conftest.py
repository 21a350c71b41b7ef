"""What pytest needs to know of this folder: paths, devices, seeds."""

import signal
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "bindings"), str(ROOT / "test")]

# A shell that runs the suite in the background ignores Ctrl-C for it and its children; tests of interrupts need it.
signal.signal(signal.SIGINT, signal.default_int_handler)

_missing: dict[str, int] = {}  # why a device is not there: tests that did not run


@pytest.fixture(params=["cpu", "nvidia"])
def device(request: pytest.FixtureRequest) -> str:
    """The name of a device type with at least one device; skips otherwise."""
    from test_utils import absence

    reason = absence(request.param)
    if reason:
        _missing[reason] = _missing.get(reason, 0) + 1
        pytest.skip(reason)
    return request.param


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch = sys.modules.get("torch")
    if torch:
        torch.manual_seed(0)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for reason, count in _missing.items():
        terminalreporter.write_line(f"!!! {count} tests NOT RUN: {reason}", yellow=True, bold=True)
