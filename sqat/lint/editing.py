"""A graph under repair: nodes put in or taken out, constants added or replaced, and a list of what was done.

Why on the protobuf: a repair follows the findings, and those come from the read-only view of the protobuf
(`sqat.lint.wiring`), whose nodes are edited in place here.
"""

from __future__ import annotations

import itertools
from collections import defaultdict

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, helper, numpy_helper

from sqat.lint.findings import Change
from sqat.lint.wiring import Wiring, label, names_in

Array = NDArray[np.generic]


class Editing:
    """A copy of a model that repairs work on, one after the other; `commit` ends each.

    Attributes:
        unread: names that nothing needed before the first repair.
    """

    def __init__(self, model: ModelProto) -> None:
        self.model = ModelProto()
        self.model.CopyFrom(model)
        self.changes: list[Change] = []
        self.wiring = Wiring(self.model)
        self.inserted: dict[int, list[NodeProto]] = defaultdict(list)
        self.dropped: set[int] = set()
        self.names = names_in(self.model.graph)
        self.unread = self.names - self.wiring.needed

    def note(self, rule: str, node: str, text: str) -> None:
        """Remember what was done."""
        self.changes.append(Change(rule, node, text))

    def free(self, name: str) -> str:
        """The name, numbered if it is taken; taken from now on."""
        names = itertools.chain([name], (f"{name}_{number}" for number in itertools.count(1)))
        found = next(candidate for candidate in names if candidate not in self.names)
        self.names.add(found)
        return found

    def constant(self, name: str, value: Array | np.generic) -> str:
        """Add an initializer, numbered if its name is taken; returns its name."""
        free = self.free(name)
        self.model.graph.initializer.append(numpy_helper.from_array(np.asarray(value, order="C"), free))
        self.wiring.tensors[free] = self.model.graph.initializer[-1]
        return free

    def copied(self, name: str) -> str:
        """An initializer of its own with the value of a constant; the tensor itself if it is no constant."""
        value = self.wiring.constant(name)
        return name if value is None else self.constant(name, value)

    def replace(self, name: str, value: Array) -> None:
        """Give an initializer or a Constant node another value."""
        self.wiring.tensors[name].CopyFrom(numpy_helper.from_array(value, name))

    def before(self, reader: NodeProto, op: str, inputs: list[str], like: NodeProto) -> str:
        """Put a node before another one, attributes and name as those of a third; returns the output's name."""
        name = self.free(label(like))
        node = helper.make_node(op, inputs, [self.free(f"{name}:0")], name=name)
        node.attribute.extend(like.attribute)
        self.inserted[id(reader)].append(node)
        return str(node.output[0])

    def drop(self, node: NodeProto) -> None:
        """Take a node out."""
        self.dropped.add(id(node))

    def commit(self) -> None:
        """Write the edits into the graph, and look at it anew."""
        nodes = []
        for node in self.wiring.nodes:
            nodes += self.inserted[id(node)]
            if id(node) not in self.dropped:
                nodes.append(NodeProto.FromString(node.SerializeToString()))
        del self.model.graph.node[:]
        self.model.graph.node.extend(nodes)
        self.inserted.clear()
        self.dropped.clear()
        self.wiring = Wiring(self.model)
