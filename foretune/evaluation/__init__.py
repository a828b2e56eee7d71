"""How good is it: loss and perplexity of base and tuned model on the same tokens, with intervals, tasks and answers."""

from foretune.evaluation.evaluate import evaluate_model, evaluate_run
from foretune.evaluation.tasks import TASKS

__all__ = ["TASKS", "evaluate_model", "evaluate_run"]
