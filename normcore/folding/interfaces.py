"""What two graphs show to a caller, and the tensors by which they can be compared."""

from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto

_SATURATING = frozenset({"Softmax", "LogSoftmax", "Sigmoid", "HardSigmoid", "Tanh", "Softsign", "Erf", "Clip"})
_PASSING = frozenset({"Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Cast"})


Names = tuple[str, str]


def find_difference(original: ModelProto, folded: ModelProto, *, names: Names = ("original", "folded")) -> str | None:
    """Why a caller of the one cannot call the other, in a sentence that calls them by `names`, or None."""
    pairs = (
        ("inputs", required_inputs(original), required_inputs(folded)),
        ("outputs", list(original.graph.output), list(folded.graph.output)),
    )
    for role, before, after in pairs:
        listed = [", ".join(info.name for info in infos) or "none" for infos in (before, after)]
        if [info.name for info in before] != [info.name for info in after]:
            return f"the {role} of the {names[0]} are {listed[0]}, those of the {names[1]} {listed[1]}"
        for left, right in zip(before, after, strict=True):
            difference = _differs(left, right, names[1], is_input=role == "inputs")
            if difference:
                return f"{role[:-1]} {left.name} of the {names[0]} is {difference}"
    return None


def find_preactivations(original: ModelProto, folded: ModelProto) -> dict[str, str]:
    """By output, the tensor before the saturating function that ends both graphs alike, under one name in both."""
    before, after = _tails(original), _tails(folded)
    return {output: tail[0] for output, tail in before.items() if after.get(output) == tail}


def required_inputs(model: ModelProto) -> list[ValueInfoProto]:
    """Inputs without an initializer, which stands for them where a caller feeds none."""
    constants = {tensor.name for tensor in model.graph.initializer}
    return [info for info in model.graph.input if info.name not in constants]


def _differs(left: ValueInfoProto, right: ValueInfoProto, other: str, *, is_input: bool) -> str | None:
    types = [info.type.tensor_type.elem_type for info in (left, right)]
    if types[0] != types[1]:
        before, after = (TensorProto.DataType.Name(kind) for kind in types)
        return f"{before}, that of the {other} is {after}"
    shapes = [info.type.tensor_type.shape.dim for info in (left, right)]
    is_known = all(info.type.tensor_type.HasField("shape") for info in (left, right))
    if not is_known:
        return None
    sizes = [[dim.dim_value if dim.dim_value > 0 else -1 for dim in dims] for dims in shapes]
    is_same = len(sizes[0]) == len(sizes[1]) and all(
        one == other or (not is_input and -1 in (one, other)) for one, other in zip(*sizes, strict=True)
    )
    return None if is_same else f"of shape {sizes[0]}, that of the {other} is {sizes[1]}"


def _tails(model: ModelProto) -> dict[str, list[str]]:
    """By output: its preactivation, then the operators from there on, each with its attributes."""
    producers: dict[str, NodeProto] = {}
    for node in model.graph.node:
        producers.update(dict.fromkeys(node.output, node))
    found = {}
    for output in model.graph.output:
        operators = []
        node = producers.get(output.name)
        while node is not None and node.op_type in _PASSING:
            operators.append(_operator(node))
            node = producers.get(node.input[0])
        if node is not None and node.op_type in _SATURATING and node.input[0] in producers:
            found[output.name] = [node.input[0], _operator(node), *reversed(operators)]
    return found


def _operator(node: NodeProto) -> str:
    return f"{node.op_type} {sorted(str(attribute) for attribute in node.attribute)}"
