"""launch/pretrain.py with a pause before each step, so that runs without an end leave the processors to other tests."""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # launchers start it from any folder
from tests.tools.changed_run import before_each_step, start

if __name__ == "__main__":
    start(lambda: before_each_step(lambda trainer, share: time.sleep(0.05)))
