"""The head of a fine-tuned source: its outputs are aligned to the task's labels by name, or it starts new.

A source numbers its labels its own way. Its rows keep their meaning only if each goes to the label of its name.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from sqat.compat import draw_weights_
from sqat.errors import SqatError

DEFAULT_NAME = re.compile(r"label_?(\d+)", re.IGNORECASE)
LARGEST_HEAD = 1 << 20  # outputs that are named one by one
SHOWN = 5  # labels in a message


@dataclass(frozen=True)
class TaskHead:
    """The head that a task needs.

    Attributes:
        entries: of the model's config: num_labels, id2label, problem_type, ...
        is_trained: whether the stage that loads the model trains it on labels.
        must_exist: whether a source without such a head is refused.
        report: receives a line about what becomes of the source's head.
    """

    entries: Mapping[str, Any]
    is_trained: bool = True
    must_exist: bool = False
    report: Callable[[str], None] = lambda line: None

    @property
    def labels(self) -> tuple[str, ...]:
        """Labels of a classification in order; empty for one output or none, which have no order."""
        labels = tuple(self.entries.get("id2label", {}).values())
        return labels if len(labels) > 1 else ()


def source_labels(config: Mapping[str, Any], place: str) -> tuple[str, ...]:
    """Return the labels of a model by the entries of its config, in the order of its outputs.

    Raises:
        SqatError: the config numbers them in no order, or contradicts itself.
    """
    id2label, label2id = config.get("id2label") or {}, config.get("label2id") or {}
    try:
        by_number = {int(number): str(name) for number, name in id2label.items()}
        by_name = {int(number): str(name) for name, number in label2id.items()}
    except (ValueError, TypeError, AttributeError):
        raise bad_labels("are not numbers with names", place) from None
    count = config.get("num_labels") or len(by_name) or 2
    if not isinstance(count, int) or not 0 < count <= LARGEST_HEAD:
        raise SqatError(f"num_labels is {str(count)[:40]!r}, not a number of labels", "get the model again", place,
                        code="model-mismatch")  # fmt: skip
    numbered = by_number or dict(enumerate(default_names(count)))
    if sorted(numbered) != list(range(len(numbered))):
        raise bad_labels(f"have the numbers {cut(map(str, sorted(numbered)))}, which do not count from 0", place)
    names = tuple(numbered[number] for number in range(len(numbered)))
    others = tuple(by_name.get(number, "") for number in range(len(names)))
    if not by_name or others == names or sorted(by_name) != list(range(len(names))) or has_default_names(others):
        return names
    if has_default_names(names):
        return others
    raise bad_labels(f"are {cut(names)}, but label2id has {cut(others)}", place)


def bad_labels(problem: str, place: str) -> SqatError:
    """Make the error for labels that a config does not number soundly."""
    return SqatError(f"id2label of config.json: its labels {problem}", "number them 0, 1, ... as the outputs are",
                     place, code="unsupported-model")  # fmt: skip


def default_names(count: int) -> tuple[str, ...]:
    """Return the names that transformers gives to outputs without one."""
    return tuple(f"LABEL_{number}" for number in range(count))


def has_default_names(labels: Sequence[str]) -> bool:
    """Say whether labels are numbers in order, which carry no meaning of their own."""
    return tuple(label_form(label) for label in labels) == tuple(map(str, range(len(labels))))


def label_form(label: str) -> str:
    """Return what label names with one meaning share: without case and punctuation; LABEL_3 is 3."""
    words = re.sub(r"[\s_-]+", " ", unicodedata.normalize("NFKC", label)).strip().casefold()
    default = DEFAULT_NAME.fullmatch(words.replace(" ", "_"))
    return str(int(default[1])) if default else words


def match_labels(source: Sequence[str], labels: Sequence[str]) -> list[int] | None:
    """Return for each label the number of the source's output of that name; None where names do not match."""
    for form in (str, label_form):
        outputs = {form(name): number for number, name in enumerate(source)}
        wanted = [form(label) for label in labels]
        if len(outputs) == len(source) == len(wanted) and set(wanted) == set(outputs):
            return [outputs[name] for name in wanted]
    return None


def same_order(source: Sequence[str], labels: Sequence[str]) -> bool:
    """Say whether labels are the source's names in its order; numbers match outputs without names."""
    return tuple(source) == tuple(labels) or (has_default_names(source) and has_default_names(labels))


def label_axes(
    shapes: Mapping[str, Sequence[int]], larger: Mapping[str, Sequence[int]], outputs: int
) -> dict[str, int]:
    """Find the tensors that have a row for each label: their shape follows the number of labels.

    Args:
        shapes: of a model's weights.
        larger: the same with one more output.

    Returns:
        The axis of each, by name.
    """
    axes = {}
    for name, shape in shapes.items():
        differs = [axis for axis, size in enumerate(shape) if larger[name][axis] != size]
        if len(differs) == 1 and shape[differs[0]] == outputs:
            axes[name] = differs[0]
    return axes


def settle_head_(
    model: PreTrainedModel, axes: Mapping[str, int], choice: str, source: Sequence[str], head: TaskHead, loading: Any
) -> None:
    """Align a loaded head to the task's labels, or let it start new and report so.

    Args:
        axes: from `label_axes`.
        choice: ``model.head`` of the recipe.
        source: the source's labels.
        loading: transformers' report: names of missing and mismatched weights, which are random already.

    Raises:
        SqatError: labels whose names do not match, or a new head that nothing would train.
    """
    resized = axes.keys() & {name for name, *_ in loading["mismatched_keys"]}
    missing = axes.keys() & set(loading["missing_keys"])
    if head.must_exist and (resized or missing):
        has = f"{len(source)} outputs ({cut(source)})" if resized else "no head"
        raise SqatError(f"the source has {has}, but {head.entries['num_labels']} outputs are needed",
                        "take a model that is fine-tuned on the task", str(model.config.name_or_path),
                        code="model-mismatch")  # fmt: skip
    if choice == "in-order" and (resized or missing):
        has = f"{len(source)} outputs" if resized else "no head"
        needs = head.entries["num_labels"]
        raise SqatError(f"model.head is in-order, but the source has {has} and the task needs {needs} outputs",
                        "remove it", code="recipe-conflict")  # fmt: skip
    if 0 < len(resized | missing) < len(axes):
        draw_head_(model, axes)  # half a head has no meaning
    if resized:
        outputs = head.entries["num_labels"]
        head.report(f"the head starts new: the source's has {len(source)} outputs ({cut(source)}), the task {outputs}")
    elif missing:
        if type(model).__name__ in (model.config.architectures or ()):
            head.report("the head starts new: the source has no weights for it")
    elif choice == "new":
        draw_head_(model, axes)
        head.report("the head starts new, as model.head says")
    elif head.labels and choice == "by-name":
        align_(model, axes, source, head)


def align_(model: PreTrainedModel, axes: Mapping[str, int], source: Sequence[str], head: TaskHead) -> None:
    """Move the rows of a loaded head to the task's labels by name."""
    order = match_labels(source, head.labels)
    if order is None and has_default_names(source) and head.is_trained:
        draw_head_(model, axes)
        head.report(f"the head starts new: its outputs in the source are {cut(source)}, the labels {cut(head.labels)}")
        return
    if order is None:
        raise unmatched(source, head.labels)
    if list(source) != list(head.labels):
        head.report(
            f"the outputs {cut(source[number] for number in order)} of the source's head become {cut(head.labels)}"
        )
    if order == sorted(order):
        return
    if not axes:
        raise SqatError("which weights make the labels cannot be told, so they cannot be put in another order",
                        f"list task.labels in the source's order: {cut(source)}", code="unsupported-model")  # fmt: skip
    tensors = model.state_dict()
    for name, axis in axes.items():
        tensors[name].copy_(tensors[name].index_select(axis, torch.tensor(order)))


def cut(labels: Iterable[str]) -> str:
    """Join the first labels for a message."""
    names = list(labels)
    return ", ".join(names[:SHOWN]) + (f", ... ({len(names)})" if len(names) > SHOWN else "")


def draw_head_(model: PreTrainedModel, axes: Mapping[str, int]) -> None:
    """Draw the weights of the modules that make the labels anew."""
    for name in sorted({name.rpartition(".")[0] for name in axes}):
        draw_weights_(model, model.get_submodule(name))


def unmatched(source: Sequence[str], labels: Sequence[str]) -> SqatError:
    """Make the error for labels that cannot be aligned."""
    reason = "do not say which is which, and this stage trains no head"
    forms = [{label_form(name) for name in names} for names in (source, labels)]
    only = [name for name in source if label_form(name) not in forms[1]]
    other = [name for name in labels if label_form(name) not in forms[0]]
    if not has_default_names(source) and (only or other):
        reason = f"have other names: the data lack {cut(only) or 'none'}, the source lacks {cut(other) or 'none'}"
    return SqatError(f"the outputs of the source's head are {cut(source)}, the task's labels {cut(labels)}; "
                     f"they {reason}",
                     "use the source's names, or set model.head: in-order (output 1 is the first label) or new",
                     code="model-mismatch")  # fmt: skip
