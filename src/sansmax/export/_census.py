"""The operators of a graph, and those among them that are exponentials by definition."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import onnx
from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.fx import GraphModule

__all__ = ["EXPONENTIALS", "every_node", "exponentials", "of_onnx", "of_program"]

# Names without underscores, in small letters: of ONNX's operators and of ATen's. Erf, and so GELU, is the
# integral of an exponential and none itself.
EXPONENTIALS = frozenset(
    [
        *("exp", "exp2", "expm1", "logsumexp", "reducelogsumexp", "sinh", "cosh", "tanh"),
        *("softmax", "safesoftmax", "logsoftmax", "softmaxcrossentropyloss"),
        *("attention", "scaleddotproductattention", "lstm", "gru", "rnn"),
        *("sigmoid", "logsigmoid", "silu", "swish", "softplus", "mish", "elu", "selu", "celu"),
    ]
)


def of_onnx(model: onnx.ModelProto) -> dict[str, int]:
    """Operator -> how often it stands in the graph, in its branches and in its functions; the most frequent
    first."""
    graphs = [model.graph.node, *(function.node for function in model.functions)]
    local = {function.name for function in model.functions}
    return _sorted(
        node.op_type for nodes in graphs for node in every_node(nodes) if node.op_type not in local
    )


def of_program(program: ExportedProgram) -> dict[str, int]:
    """As of_onnx: ATen's operators as the network calls them."""
    graphs: Any = [one for one in program.graph_module.modules() if isinstance(one, GraphModule)]
    calls = (node.target for one in graphs for node in one.graph.nodes if node.op == "call_function")
    return _sorted(target.overloadpacket.__name__ for target in calls if isinstance(target, OpOverload))


def exponentials(operators: dict[str, int]) -> dict[str, int]:
    """Those of EXPONENTIALS."""
    return {name: n for name, n in operators.items() if name.replace("_", "").lower() in EXPONENTIALS}


def every_node(nodes: Any) -> Iterator[onnx.NodeProto]:
    """Those of branches too."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                yield from every_node(graph.node)


def _sorted(names: Iterator[str]) -> dict[str, int]:
    return dict(sorted(Counter(names).items(), key=lambda item: (-item[1], item[0])))
