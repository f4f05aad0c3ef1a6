"""How good a model is: held-out loss, generated answers, tasks of lm-evaluation-harness."""
