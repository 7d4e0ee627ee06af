"""Runs train.py until it has been in some stage for some seconds, then kills it; run by test_interruption.py.

Arguments: the stage (or `before note`, `after note`: when the next stage is complete, around writing that down), the seconds,
and train's own.
"""

import os
import signal
import sys
import threading
import time

from hierarchical_diffusion_rlhf_caption_refinement import cli
from hierarchical_diffusion_rlhf_caption_refinement.training.pipeline import Pipeline


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_after(seconds: float, stage: str) -> None:
    time.sleep(seconds)
    os.write(1, f"killed inside {stage}\n".encode())
    kill()


def main(moment: str, seconds: float, arguments: list[str]) -> None:
    complete, begin = Pipeline.note, Pipeline.begin

    def note(self, times):
        recorded = len(times) > len(self.times())
        if recorded and moment != "after note":
            kill()
        complete(self, times)
        if recorded:
            kill()

    def started(self, stage):
        begin(self, stage)
        if stage == moment:
            threading.Thread(target=kill_after, args=(seconds, stage), daemon=True).start()
            Pipeline.note = note
        elif "note" in moment:
            Pipeline.note = note

    Pipeline.begin = started
    sys.exit(cli.train(arguments))


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), sys.argv[3:])
