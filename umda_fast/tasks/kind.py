"""A task, which is plain data, and its kind, which is all that differs from kind to kind, in one object."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from umda_fast.errors import DataError
from umda_fast.tasks.checks import as_float, as_tuple, check_int, check_name
from umda_fast.tasks.timed_fields import OF_TIME, checked_timed_fields

if TYPE_CHECKING:
    from torchmetrics import Metric

    from umda_fast.tasks.shown import Shown

__all__ = ["TASK_KINDS", "Array", "ClassWeights", "FloatArray", "TaskKind", "TaskSpec", "kind_of", "register_kind"]

Array: TypeAlias = npt.NDArray[Any]
FloatArray: TypeAlias = npt.NDArray[np.float64]
ClassWeights: TypeAlias = Literal["balanced"] | None


@dataclass(frozen=True)
class TaskSpec:
    """One task: what is predicted for a bag and how it is scored.

    Attributes:
        name: unique among a model's tasks.
        kind: of `TASK_KINDS`: `binary` (label 0/1), `multiclass` (label 0..classes-1), `multilabel` (classes 0/1
            labels), `regression` (a real number), `ordinal` (label 0..classes-1, in an order), or one that was
            registered; `survival` (a time and whether the event came then).
        classes: 1 for binary and regression, at least 2 for multiclass and ordinal, at least 1 for multilabel;
            of survival the number of intervals.
        mean, std: regression only, of the training labels in original units; losses see `(y - mean) / std`.
        labels: names of the classes: 2 for binary (of label 0, of label 1), else `classes`.
        class_weights: weights in the loss: 2 for binary (of label 0, of label 1), `classes` for multiclass
            and ordinal, `classes` for multilabel (of each label's positives); None weighs all alike.
        thresholds: multilabel only, the probability from which each of the `classes` labels is predicted; None: 0.5.
        cuts: survival only, the ends of the `classes` intervals of time, rising; None: not chosen yet.
        hazards: survival only, what share of all training bags that come to an interval has the event in it.
        intervals: survival only, how many are wanted; None: by the number of events.
        times: survival only, at which predictions are shown; None: quartiles of the cuts.
        loss: survival only, `hazards` (also None) or `cox`.
        baseline: of the loss `cox`, the cumulative baseline hazard at every cut; None: not trained yet.
        columns: survival only, the columns of a table with the times and the events; None: by the task's name.

    Sequences are stored as tuples, so `TaskSpec(**json.loads(json.dumps(dataclasses.asdict(spec)))) == spec`.

    Raises:
        TypeError, ValueError: naming the field, what was expected and what came.
    """

    name: str
    kind: str
    classes: int = 1
    mean: float = 0.0
    std: float = 1.0
    labels: tuple[str, ...] | None = None
    class_weights: tuple[float, ...] | None = None
    thresholds: tuple[float, ...] | None = None
    cuts: tuple[float, ...] | None = None
    hazards: tuple[float, ...] | None = None
    intervals: int | None = None
    times: tuple[float, ...] | None = None
    columns: tuple[str, ...] | None = None
    loss: str | None = None
    baseline: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        check_name("TaskSpec", self.name)
        where = f"TaskSpec({self.name!r})"
        if not isinstance(self.kind, str) or self.kind not in TASK_KINDS:
            raise ValueError(f"{where}.kind: expected one of {', '.join(TASK_KINDS)}, got {self.kind!r}")
        self._check_classes(where)
        self._check_standardisation(where)
        if self.labels is not None:
            self._check_labels(where)
        if self.class_weights is not None:
            self._check_class_weights(where)
        if self.thresholds is not None:
            self._check_thresholds(where)
        if any(getattr(self, field) is not None for field in OF_TIME):
            self._check_time(where)

    def _check_classes(self, where: str) -> None:
        kind = kind_of(self)
        classes = check_int(f"{where}.classes", self.classes)
        if classes < kind.least_classes or (classes > kind.least_classes and not kind.any_classes):
            expected = f"at least {kind.least_classes}" if kind.any_classes else kind.least_classes
            raise ValueError(f"{where}.classes: expected {expected} for a {self.kind} task, got {classes}")

    def _check_standardisation(self, where: str) -> None:
        object.__setattr__(self, "mean", as_float(f"{where}.mean", self.mean))
        object.__setattr__(self, "std", as_float(f"{where}.std", self.std))
        if self.std <= 0.0:
            raise ValueError(f"{where}.std: expected a positive number, got {self.std}")
        if not kind_of(self).standardised and (self.mean, self.std) != (0.0, 1.0):
            raise ValueError(
                f"{where}: mean and std belong to {_with('standardised')} tasks, got {self.mean}, {self.std} "
                f"for a {self.kind} task"
            )

    def _check_labels(self, where: str) -> None:
        labels = as_tuple(f"{where}.labels", self.labels)
        if not all(isinstance(label, str) for label in labels):
            raise TypeError(f"{where}.labels: expected strings, got {labels!r}")
        self._check_per_class(f"{where}.labels", labels)
        if len(set(labels)) != len(labels):
            raise ValueError(f"{where}.labels: expected distinct names, got {labels!r}")
        object.__setattr__(self, "labels", labels)

    def _check_class_weights(self, where: str) -> None:
        argument = f"{where}.class_weights"
        weights = tuple(as_float(argument, weight) for weight in as_tuple(argument, self.class_weights))
        self._check_per_class(argument, weights)
        if any(weight <= 0.0 for weight in weights):
            raise ValueError(f"{argument}: expected positive numbers, got {weights!r}")
        object.__setattr__(self, "class_weights", weights)

    def _check_thresholds(self, where: str) -> None:
        argument = f"{where}.thresholds"
        thresholds = tuple(as_float(argument, value) for value in as_tuple(argument, self.thresholds))
        if not kind_of(self).thresholded:
            raise ValueError(
                f"{argument}: belong to {_with('thresholded')} tasks, got {thresholds} for a {self.kind} task"
            )
        self._check_per_class(argument, thresholds)
        if any(not 0.0 <= value <= 1.0 for value in thresholds):
            raise ValueError(f"{argument}: expected numbers in 0..1, got {thresholds!r}")
        object.__setattr__(self, "thresholds", thresholds)

    def _check_time(self, where: str) -> None:
        fields = {field: getattr(self, field) for field in OF_TIME}
        if not kind_of(self).timed:
            said = next(field for field, value in fields.items() if value is not None)
            raise ValueError(f"{where}.{said}: belongs to {_with('timed')} tasks, got it for a {self.kind} task")
        for field, value in checked_timed_fields(where, self.classes, kind_of(self).named_losses, fields).items():
            object.__setattr__(self, field, value)

    def _check_per_class(self, argument: str, values: tuple[object, ...]) -> None:
        expected = kind_of(self).class_count(self)
        if expected == 0:
            raise ValueError(f"{argument}: a {self.kind} task has no classes, got {values!r}")
        if len(values) != expected:
            raise ValueError(f"{argument}: expected {expected} values for a {self.kind} task, got {len(values)}")

    @property
    def outputs(self) -> int:
        """Width of the task's head: 1 for binary and regression, `classes - 1` for ordinal, else `classes`."""
        return kind_of(self).outputs(self)

    @property
    def label_shape(self) -> tuple[int, ...]:
        """Shape of one label: () but for a kind with several numbers for a bag, as multilabel: (classes,)."""
        return kind_of(self).label_shape(self)

    @property
    def identity(self) -> tuple[object, ...]:
        """What agrees between specs of one task: name, kind, loss and classes. The intervals of a timed one are, as the
        scale of a regression is, those of each training."""
        return self.name, self.kind, self.loss, None if kind_of(self).timed else self.classes

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, their numbers where they have none; () for a task without classes."""
        return self.labels or tuple(str(index) for index in range(kind_of(self).class_count(self)))


class TaskKind(ABC):
    """What a kind of task is: its labels, its loss, its prediction, its scores and how they are shown.

    An object has no state: what differs from task to task stands in the `TaskSpec`, which every method is given.
    Extend the nearest of `Values` (a number for a bag), `OneClass`, `Multilabel` or this, and `register_kind` an
    object of it. B: the bags that carry the task's label, unless something else is said.
    """

    name: ClassVar[str]
    """As `TaskSpec.kind` has it."""
    primary: ClassVar[str]
    """The metric, of `metrics`, that enters `mean_score` and is compared."""
    loss_name: ClassVar[str]
    """Of the loss's axis in a plot, with the unit."""
    least_classes: ClassVar[int] = 1
    """Of `TaskSpec.classes`; more are allowed if `any_classes`."""
    any_classes: ClassVar[bool] = False
    standardised: ClassVar[bool] = False
    """Whether `TaskSpec.mean` and `std` are used."""
    thresholded: ClassVar[bool] = False
    """Whether `TaskSpec.thresholds` are used, and chosen for F1 on validation bags."""
    timed: ClassVar[bool] = False
    """Whether a label is a time and an event, and `TaskSpec.cuts` and what belongs to them are used."""
    decides: ClassVar[bool] = True
    """Whether something is predicted that turns out right or wrong, with a confidence; of a kind with temperatures."""
    calibration: ClassVar[Literal["temperature", "interval"] | None] = None
    """How a prediction's certainty is made known: probabilities whose logits a temperature divides, a number with an
    interval around it, or not at all."""
    scarce: ClassVar[str] = "bags not of the most frequent class"
    """What a temperature needs some of: the bags beside those of the commonest of `outcomes`."""
    adds_up: ClassVar[bool] = True
    """Whether logits of independent views add up, as log-odds do; values are averaged."""
    several: ClassVar[bool] = False
    """Whether a label is several numbers; `label_shape` says how many."""
    no_label: ClassVar[float] = 0.0
    """What `losses` are given for a label that is missing."""
    named_losses: ClassVar[tuple[str, ...]] = ()
    """What `TaskSpec.loss` may say, of a kind with a choice."""
    label_dtype: ClassVar[torch.dtype] = torch.float32
    """Of labels in a batch."""

    # ---- the model's side

    def class_count(self, task: TaskSpec) -> int:
        """Classes that may have names and weights; 0 for a kind without."""
        return 0

    def outputs(self, task: TaskSpec) -> int:
        """Width of the head."""
        return 1

    def label_shape(self, task: TaskSpec) -> tuple[int, ...]:
        """Shape of one label, () or (n,)."""
        return ()

    def joint(self, task: TaskSpec) -> bool:
        """Whether the loss of a bag depends on the bags beside it, so that it has to be found over all of them."""
        return False

    def location(self, task: TaskSpec, logits: Tensor) -> Tensor | None:
        """A scalar of logits [B, outputs] on which a `joint` loss does not depend, and which training keeps near 0."""
        return None

    @abstractmethod
    def losses(self, task: TaskSpec, logits: Tensor, target: Tensor) -> Tensor:
        """Loss of every bag, [B].

        Args:
            logits: float32 or float64 [B, outputs]. target: [B, *label_shape], `no_label` where it is missing.
        """

    def weights(self, task: TaskSpec, target: Tensor, like: Tensor) -> Tensor | None:
        """Weights of the bags in the mean of `losses`, [B] in the dtype of `like`; None weighs all alike."""
        return None

    def bag_losses(self, task: TaskSpec, logits: Tensor, target: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
        """Loss and weight of every bag, [B] each; both 0 where there is no label.

        Args:
            keep: bool [B], which bags carry the label; None: all. Labels elsewhere may be NaN.
        """
        if keep is not None:
            target = target.masked_fill(~keep if target.dim() == 1 else ~keep[:, None], self.no_label)
        losses = self.losses(task, logits, target)
        weight = self.weights(task, target, logits)
        weight = logits.new_ones(len(target)) if weight is None else weight
        if keep is not None:
            weight = weight.masked_fill(~keep, 0.0)
            losses = losses.masked_fill(~keep, 0.0)
        return losses, weight

    def loss(self, task: TaskSpec, logits: Tensor, target: Tensor, keep: Tensor | None) -> Tensor:
        """The mean of `bag_losses` by their weights, a scalar."""
        if keep is None and self.weights(task, target, logits) is None:
            return self.losses(task, logits, target).mean()
        losses, weight = self.bag_losses(task, logits, target, keep)
        return (losses * weight).sum() / weight.sum()

    @abstractmethod
    def decode(self, task: TaskSpec, logits: Tensor) -> Tensor:
        """The prediction, probabilities or values in original units, [B, n], of float32 or float64 logits.

        n is the kind's own choice; of the kinds here it is `outputs`.
        """

    def centred(self, logits: Tensor) -> Tensor:
        """Logits [B, outputs] without what a prediction does not depend on."""
        return logits

    @abstractmethod
    def mean_logits(self, tasks: Sequence[TaskSpec], logits: Sequence[Tensor]) -> Tensor:
        """Logits [B, outputs] that `decode`, by the first spec, makes the mean of all predictions."""

    @abstractmethod
    def linear_targets(self, task: TaskSpec, target: Array) -> FloatArray:
        """What a linear head is fitted to by least squares, [B, outputs], so that it stands for logits.

        Args:
            target: float64 [B, *label_shape].
        """

    # ---- labels: from arrays to float64 columns [B, *label_shape], NaN where missing

    @abstractmethod
    def read(self, where: str, name: str, array: Array) -> tuple[TaskSpec, FloatArray]:
        """The task `name` of this kind and its column, from labels as they came.

        Args:
            array: [B], or [B, C] for a kind whose labels are several numbers, of any dtype.

        Raises:
            DataError: starting with `where`.
        """

    @abstractmethod
    def read_as(self, where: str, task: TaskSpec, array: Array) -> FloatArray:
        """The column of a task whose spec is known; otherwise as `read`."""

    def read_cells(self, where: str, cells: Sequence[str], task: Mapping[str, Any]) -> tuple[Array, dict[str, Any]]:
        """Labels as `read` takes them from the cells of a table, "" where missing, and what this fixes of the spec.

        Args:
            task: what is known of the spec already.
        """
        return np.array(cells, dtype=object), {}

    @abstractmethod
    def check_label(self, where: str, task: TaskSpec, label: Tensor) -> None:
        """Raise DataError, starting with `where`, unless a tensor may be the label of one bag."""

    def fit(self, task: TaskSpec, column: FloatArray, class_weights: ClassWeights = None) -> TaskSpec:
        """The spec fitted to the labels of training bags."""
        return task

    def complete(self, task: TaskSpec, column: FloatArray) -> TaskSpec:
        """A spec that someone gave, with what a model cannot do without from all labels there are."""
        return task

    def complete_trained(self, task: TaskSpec, logits: Tensor, target: Tensor) -> TaskSpec:
        """The spec with what predictions need besides the weights, from what a model that is trained makes of its
        training bags, [B, outputs]; B may be 0."""
        return task

    def outcomes(self, task: TaskSpec, column: FloatArray) -> list[int]:
        """How many of the bags, which are labelled, had each of the outcomes of which a bag has one, as far as their
        numbers say whether labels suffice for a temperature; [] where a label is not one of few."""
        return [] if self.several else self.counts(task, column)

    def counts(self, task: TaskSpec, column: FloatArray) -> list[int]:
        """Labelled bags of every class; [] for a kind without classes."""
        return []

    @abstractmethod
    def constant(self, task: TaskSpec, column: FloatArray) -> FloatArray:
        """Logits [outputs], finite, of the one prediction for all bags that has the least loss on the labels of
        training bags; every class is counted half a time more than it occurs (Krichevsky and Trofimov's estimate)."""

    def chance(self, task: TaskSpec, column: FloatArray) -> float:
        """What `primary` comes to for a prediction that looks at no bag, at its best, by the labels of training bags;
        less than 1."""
        return 0.0

    @abstractmethod
    def strata(self, task: TaskSpec, column: FloatArray) -> list[npt.NDArray[np.bool_]]:
        """What a split should balance, each bool [B], False where the label is missing."""

    def rename(self, task: TaskSpec, column: FloatArray, positions: Sequence[int]) -> FloatArray:
        """A column whose class c is the class `positions[c]` of `task`."""
        raise DataError(f"task {task.name!r}: a {self.name} task has no classes")

    def summary(self, column: FloatArray) -> dict[str, float]:
        """Figures of the labels for `inspect`, by name; {} without labels or for a kind with classes."""
        return {}

    @abstractmethod
    def problem(self, task: TaskSpec, column: FloatArray, everywhere: FloatArray) -> str | None:
        """What is suspicious about the labels of a split, which has some; `everywhere`: those of all splits."""

    # ---- scores, of predictions as `decode` gives them and labels

    @abstractmethod
    def metrics(self, task: TaskSpec) -> dict[str, Metric]:
        """Metrics by name, `primary` among them."""

    def for_metric(self, task: TaskSpec, metric: str, prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Prediction and label in the form in which a metric takes them."""
        return prediction, target

    def defined(self, task: TaskSpec, metric: str, target: Tensor) -> Tensor | None:
        """Where a metric is defined on these labels: a bool, or [classes] for one by class; None: it always is."""
        return None

    @abstractmethod
    def primary_score(self, task: TaskSpec, prediction: Array, target: Array) -> float:
        """The metric `primary` by NumPy alone, many times as fast on few bags; NaN where undefined. B > 0."""

    def scores(self, task: TaskSpec, prediction: Array, target: Array) -> dict[str, float]:
        """All of `metrics`, NaN where undefined, of predictions [B, n] and labels, float64, B > 0. A kind whose
        intervals should not take long has them by NumPy alone."""
        known, labels = torch.from_numpy(prediction), torch.from_numpy(target).to(self.label_dtype)
        found = {}
        for name, metric in self.metrics(task).items():
            defined = self.defined(task, name, labels)
            if defined is not None and not bool(defined.any()):
                found[name] = float("nan")
                continue
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # of where it is not defined, which is known
                metric.update(*self.for_metric(task, name, known, labels))
                value = metric.compute()
            found[name] = float((value[defined] if defined is not None and value.ndim else value).double().mean())
        return found

    def few_units_of(
        self, task: TaskSpec, metric: str, score: float, target: Array, level: float
    ) -> tuple[float, float] | None:
        """As `few_units`, of any of `metrics`."""
        return self.few_units(task, score, target, level) if metric == self.primary else None

    def few_units(
        self, task: TaskSpec, score: float, target: Array, level: float
    ) -> tuple[float, float] | None:
        """Values with which few independent bags or patients would have given `primary_score` `score`, by a formula
        that is right however few they are; None: the bootstrap alone has to do.

        Args:
            target: the labels, of a patient that of one bag.
            level: of the interval, 0..1.
        """
        return None

    # ---- certainty, of a kind with probabilities

    def undecided_loss(self, task: TaskSpec, logits: Tensor) -> Tensor:
        """The mean of `losses` against a label that is every class alike, a scalar."""
        raise ValueError(f"task {task.name!r}: expected classes, got a {self.name}")

    def confidence(self, task: TaskSpec, probabilities: Tensor) -> Tensor:
        """How sure the prediction is, [B] in 0..1."""
        return probabilities.new_ones(len(probabilities))

    def reliability(self, task: TaskSpec, probabilities: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities [n] and whether what they are of came true, bool [n]: of the class predicted, or of every
        label."""
        raise ValueError(f"task {task.name!r}: expected classes, got a {self.name}")

    def correct(self, task: TaskSpec, probabilities: Tensor, target: Tensor) -> Tensor:
        """Whether the prediction is right in all its parts, bool [B]."""
        raise ValueError(f"task {task.name!r}: expected classes, got a {self.name}")

    # ---- shown

    def positive(self, task: TaskSpec) -> str | None:
        """The class that the one probability of a yes or no is of; None for a kind without such a class."""
        return None

    @abstractmethod
    def columns(self, task: TaskSpec) -> list[str]:
        """The task's columns in predictions.csv."""

    @abstractmethod
    def cells(self, task: TaskSpec, prediction: Tensor) -> list[list[str]]:
        """The cells under `columns`, for every bag."""

    @abstractmethod
    def shown_errors(self, task: TaskSpec, prediction: Tensor, target: Tensor) -> Shown:
        """What the report shows of prediction and label."""


_KINDS: dict[str, TaskKind] = {}

TASK_KINDS: Mapping[str, TaskKind] = MappingProxyType(_KINDS)
"""Kinds by name. A view: what is registered appears in it."""


def register_kind(kind: TaskKind) -> None:
    """Make a kind known, under its name.

    Raises:
        ValueError: another object of that name is there.
    """
    if _KINDS.setdefault(kind.name, kind) is not kind:
        raise ValueError(f"task kind {kind.name!r}: there is one already, {_KINDS[kind.name]!r}")


def kind_of(task: TaskSpec) -> TaskKind:
    """The kind of a task."""
    return _KINDS[task.kind]


def _with(what: str) -> str:
    return " and ".join(name for name, kind in _KINDS.items() if getattr(kind, what))
