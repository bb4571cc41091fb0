"""Tasks for recurrent networks: sequences by number, what is asked of them, and what answers are worth."""

from lockfree.recurrent.stretch import Stretch
from lockfree.recurrent.tasks.base import IGNORED, Predicts, Task
from lockfree.recurrent.tasks.copy import Copy
from lockfree.recurrent.tasks.counting import Counted, Counting
from lockfree.recurrent.tasks.curriculum import Curriculum
from lockfree.recurrent.tasks.language import CharacterModel, LanguageModel, WordModel
from lockfree.recurrent.tasks.repeat_copy import RepeatCopy
from lockfree.recurrent.tasks.sequential_images import SequentialImages

TASKS: dict[str, type[Task]] = {
    "copy": Copy,
    "repeat-copy": RepeatCopy,
    "char-lm": CharacterModel,
    "word-lm": WordModel,
    "sequential-images": SequentialImages,
    "counting": Counting,
}
"""Every task by its command-line name, each made without arguments or with its fields."""

__all__ = [
    "IGNORED",
    "TASKS",
    "CharacterModel",
    "Copy",
    "Counted",
    "Counting",
    "Curriculum",
    "LanguageModel",
    "Predicts",
    "RepeatCopy",
    "SequentialImages",
    "Stretch",
    "Task",
    "WordModel",
]
