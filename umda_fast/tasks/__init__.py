"""What is predicted for a bag: tasks and their kinds. A kind is one object, in a file of its own."""

from umda_fast.tasks.binary import Binary
from umda_fast.tasks.classes import THRESHOLD, Classes, OneClass, predicted_labels
from umda_fast.tasks.kind import TASK_KINDS, TaskKind, TaskSpec, kind_of, register_kind
from umda_fast.tasks.multiclass import Multiclass
from umda_fast.tasks.multilabel import Multilabel
from umda_fast.tasks.ordinal import Ordinal
from umda_fast.tasks.regression import Regression
from umda_fast.tasks.survival import Survival
from umda_fast.tasks.values import Values

__all__ = [
    "TASK_KINDS",
    "THRESHOLD",
    "Binary",
    "Classes",
    "Multiclass",
    "Multilabel",
    "OneClass",
    "Ordinal",
    "Regression",
    "Survival",
    "TaskKind",
    "TaskSpec",
    "Values",
    "kind_of",
    "predicted_labels",
    "register_kind",
]

# In the order in which messages list them.
for _kind in (Binary(), Multiclass(), Multilabel(), Regression(), Ordinal(), Survival()):
    register_kind(_kind)
