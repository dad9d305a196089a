"""Several tasks at once: one body, an output head for each task, their losses weighed.

On the command line the data is a YAML file that lists name, data and share of each task.

    llmbuilder finetune model --model runs/examples/base --dataset runs/examples/tasks.yaml \\
        --val-dataset runs/examples/tasks-unseen.yaml --config examples/multitask.yaml
"""

from prepare import base_model, path, text

import llmbuilder as lb
from llmbuilder.data import TaskDataset
from llmbuilder.finetune import FineTuner, FineTuningConfig


def tasks(name):
    questions = TaskDataset(path(f"questions{name}"), "question_answering")
    return lb.MultiTaskDataset([("questions", questions, 0.5), ("clinic", text(f"clinic{name}"), 0.5)])


config = FineTuningConfig(
    multi_task=True,
    task_weights={"questions": 1.0, "clinic": 0.5},
    task_specific_heads=True,
    learning_rate=2e-3,
    num_epochs=2,
    batch_size=16,
    max_seq_length=64,
    output_dir="runs/examples/multitask",
)
tuner = FineTuner(base_model(), tasks(""), tasks("-unseen"), config, overwrite=True)
before = tuner.evaluate(tasks("-unseen"))
tuner.train()
after = tuner.evaluate(tasks("-unseen"))
print(
    f"both tasks, each by its own head: perplexity {before.perplexity:.2f} before, {after.perplexity:.2f} after; ",
    end="",
)
print(f"BLEU {before.bleu_score:.1f} before, {after.bleu_score:.1f} after")
