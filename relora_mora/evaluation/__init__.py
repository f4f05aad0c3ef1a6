"""Evaluation of a model: held-out loss, generated answers, tasks of lm-evaluation-harness."""
