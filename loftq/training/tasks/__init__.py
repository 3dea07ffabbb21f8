"""The tasks that a model can learn, and those that it is measured on: the rows of all modules of this package.

A module adds rows with `TASKS` and `MEASURES`, by their names. Nothing else has to be changed for a new task.
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from loftq.errors import OptionError
from loftq.training.tasks.task import CLASSIFIER, Measure, TrainingTask

TRAINING_TASKS: dict[str, TrainingTask] = {}
MEASURES: dict[str, Measure] = {}
for _module in sorted(module.name for module in iter_modules(__path__)):
    _rows = import_module(f"{__name__}.{_module}")
    TRAINING_TASKS |= getattr(_rows, "TASKS", {})
    MEASURES |= getattr(_rows, "MEASURES", {})


def require(name: str, model_task: str, model: str, option: str | None = None) -> None:
    """Raise OptionError if a model of another task cannot learn the training task `name`, or what `option` names."""
    row = TRAINING_TASKS[name]
    if model_task in row.models:
        return
    possible = [task for task, other in TRAINING_TASKS.items() if model_task in other.models]
    steps = [f"choose a task that it can do ({', '.join(possible)})"] if possible else []
    if row.models == (CLASSIFIER,):  # any model can get a classifier's head; other heads cannot be added
        steps.append(f"quantize the model with `loftq quantize --task {CLASSIFIER}`")
    raise OptionError(
        f"--task {option or name} needs a {' or '.join(row.models)} model, and {model} is a {model_task} model: "
        f"{', or '.join([*steps, 'name another model'])}"
    )
