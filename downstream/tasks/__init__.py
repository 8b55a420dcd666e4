"""The downstream tasks, by name. A new one is one file and one line here.

A task is a recipe section with `name` and `cohort(clean) → Cohort`: it reads its tables, prints how many rows
each filter took, and gives labelled notes cleaned as the checkpoint's corpus was. One that asks about something also
has `ask(note, text) → Example | None`, for notes that are not of its tables.
"""

from downstream.tasks.classify import ClassifyTask
from downstream.tasks.mortality import MortalityTask
from downstream.tasks.readmission import ReadmissionTask
from downstream.tasks.status import StatusTask

Task = ReadmissionTask | MortalityTask | ClassifyTask | StatusTask

TASKS: dict[str, type[Task]] = {
    "readmission": ReadmissionTask,
    "mortality": MortalityTask,
    "classify": ClassifyTask,
    "status": StatusTask,
}
