"""A first signal waits, the same one again does not, and the handlers come back."""

import os
import signal
import threading
from pathlib import Path

import pytest

from hierarchical_diffusion_rlhf_caption_refinement.utils.interrupt import Interrupted, deferred_interrupts


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_first_signal_waits_and_the_second_does_not(number):
    before, reached = signal.getsignal(number), []
    with pytest.raises(KeyboardInterrupt), deferred_interrupts() as caught:
        assert caught == []
        os.kill(os.getpid(), number)
        assert caught == [number]
        reached.append("work goes on")
        os.kill(os.getpid(), number)
        reached.append("never")
    assert reached == ["work goes on"]
    assert signal.getsignal(number) == before


def test_torchrun_forwards_ctrl_c_as_two_signals():
    with deferred_interrupts() as caught:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert caught == [signal.SIGINT, signal.SIGTERM]


def test_other_threads_get_no_handlers():
    seen = []

    def work():
        with deferred_interrupts() as caught:
            seen.append(caught)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [[]]


def test_message_says_how_far_and_where():
    error = Interrupted(Path("models/last.pt"), 12)
    assert str(error) == "stopped after update 12; models/last.pt holds all that is needed to go on from there"
    assert str(Interrupted(None, 3)) == "stopped after update 3"
    assert isinstance(error, KeyboardInterrupt)
