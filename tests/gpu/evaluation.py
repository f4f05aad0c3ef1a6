"""What is evaluated on a GPU, and exported, is what was trained there: the test of that, with other ``pools``.

Run by ``make test-gpu``.
"""

from tests.train.test_settings_reach import (
    inputs,
    test_what_training_sees_is_evaluated,
    unchanged,
)
