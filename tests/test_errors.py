"""The errors: what a user sees and which exit code there is."""

import signal

import pytest

from toolkit.errors import Interrupted, ToolkitError, UsageError


def test_message_and_hint_are_kept_apart():
    error = ToolkitError("the build failed", hint="Look into the log.")
    assert str(error) == error.message == "the build failed"
    assert error.hint == "Look into the log."
    assert ToolkitError("alone").hint == ""


def test_exit_codes():
    assert ToolkitError("").code == 1
    assert UsageError("").code == 2
    assert Interrupted(signal.SIGINT).code == 130
    assert Interrupted(signal.SIGTERM).code == 143


def test_an_interruption_is_not_taken_for_a_failed_step():
    with pytest.raises(Interrupted):
        try:
            raise Interrupted(signal.SIGTERM)
        except Exception:
            pytest.fail("it was handled as an error")


def test_a_usage_error_is_handled_as_any_other():
    with pytest.raises(ToolkitError):
        raise UsageError("unknown image")
