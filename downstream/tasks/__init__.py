"""The downstream tasks, by name. A new one is one file and one line here.

A task is a recipe section with `name` and `cohort(clean) → Cohort`: it reads its tables, prints how many rows
each filter took, and gives labelled notes cleaned as the checkpoint's corpus was.
"""

from downstream.tasks.classify import ClassifyTask
from downstream.tasks.mortality import MortalityTask
from downstream.tasks.readmission import ReadmissionTask

Task = ReadmissionTask | MortalityTask | ClassifyTask

TASKS: dict[str, type[Task]] = {
    "readmission": ReadmissionTask,
    "mortality": MortalityTask,
    "classify": ClassifyTask,
}
