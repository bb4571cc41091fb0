"""Tasks for recurrent networks: sequences by number, what is asked of them, and what answers are worth."""

from lockfree.recurrent.tasks.base import IGNORED, Predicts, Stretch, Task
from lockfree.recurrent.tasks.copy import Copy
from lockfree.recurrent.tasks.curriculum import Curriculum
from lockfree.recurrent.tasks.language import CharacterModel, LanguageModel, WordModel
from lockfree.recurrent.tasks.repeat_copy import RepeatCopy

TASKS: dict[str, type[Task]] = {
    "copy": Copy,
    "repeat-copy": RepeatCopy,
    "char-lm": CharacterModel,
    "word-lm": WordModel,
}
"""Every task by its command-line name, each made without arguments or with its fields."""

__all__ = [
    "IGNORED",
    "TASKS",
    "CharacterModel",
    "Copy",
    "Curriculum",
    "LanguageModel",
    "Predicts",
    "RepeatCopy",
    "Stretch",
    "Task",
    "WordModel",
]
