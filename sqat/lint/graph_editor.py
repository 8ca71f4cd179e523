"""A copy of a graph under repair: insert and remove nodes, add and replace constants, record the changes."""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np
from onnx import ModelProto, NodeProto, helper, numpy_helper

from sqat.lint.findings import Change
from sqat.lint.graph_view import Array, GraphView, all_names, label


class GraphEditor:
    """A copy of a model that repairs edit, one after the other; `commit` ends each.

    Attributes:
        changes: what repairs did, in order.
        view: the graph as it was at the last commit; nodes are edited in place.
        unused: names that no output needed before the first repair.
    """

    def __init__(self, model: ModelProto) -> None:
        self.model = ModelProto()
        self.model.CopyFrom(model)
        self.changes: list[Change] = []
        self.view = GraphView(self.model)
        self.committed = 0
        self.inserted: dict[int, list[NodeProto]] = defaultdict(list)
        self.removed: set[int] = set()
        self.names = all_names(self.model.graph)
        self.numbers: Counter[str] = Counter()
        self.unused = self.names - self.view.needed_names()

    def record(self, rule: str, node: str, text: str) -> None:
        """Record a change."""
        self.changes.append(Change(rule, node, text))

    def unique_name(self, name: str) -> str:
        """Reserve a name, numbered if it is taken."""
        unique = name
        while unique in self.names:
            self.numbers[name] += 1  # goes on where it was, so that thousands of one name take linear time
            unique = f"{name}_{self.numbers[name]}"
        self.names.add(unique)
        return unique

    def add_constant(self, name: str, value: Array | np.generic) -> str:
        """Add an initializer; returns its name, which is numbered if taken."""
        unique = self.unique_name(name)
        self.model.graph.initializer.append(numpy_helper.from_array(np.asarray(value, order="C"), unique))
        self.view.constants[unique] = self.model.graph.initializer[-1]
        return unique

    def copy_constant(self, name: str) -> str:
        """Add an initializer with the value of a constant; returns ``name`` itself for any other tensor."""
        value = self.view.constant_value(name)
        return name if value is None else self.add_constant(name, value)

    def replace_constant(self, name: str, value: Array) -> None:
        """Give an initializer or a Constant node another value."""
        self.view.constants[name].CopyFrom(numpy_helper.from_array(value, name))

    def insert_before(self, reader: NodeProto, op: str, inputs: list[str], template: NodeProto) -> str:
        """Insert a node before another one, with a third one's attributes and name; returns its output."""
        name = self.unique_name(label(template))
        node = helper.make_node(op, inputs, [self.unique_name(f"{name}:0")], name=name)
        node.attribute.extend(template.attribute)
        self.inserted[id(reader)].append(node)
        return str(node.output[0])

    def remove(self, node: NodeProto) -> None:
        """Remove a node."""
        self.removed.add(id(node))

    def bypass(self, node: NodeProto) -> None:
        """Remove a node and let its consumers read its one operand that is no constant."""
        data = next(name for name in node.input if not self.view.is_constant(name))
        for reader in self.view.consumers_of(node):
            reader.input[:] = [data if name == node.output[0] else name for name in reader.input]
        self.remove(node)

    def commit(self) -> None:
        """Write the edits into the graph and view it anew, if there are any."""
        if len(self.changes) == self.committed and not self.inserted and not self.removed:
            return
        self.committed = len(self.changes)
        nodes = []
        for node in self.view.nodes:
            nodes += self.inserted.get(id(node), [])
            if id(node) not in self.removed:
                nodes.append(NodeProto.FromString(node.SerializeToString()))
        del self.model.graph.node[:]
        self.model.graph.node.extend(nodes)
        self.inserted.clear()
        self.removed.clear()
        self.view = GraphView(self.model)


def remove_attribute_(node: NodeProto, name: str) -> None:
    """Remove an attribute of a node."""
    kept = [entry for entry in node.attribute if entry.name != name]
    del node.attribute[:]
    node.attribute.extend(kept)
