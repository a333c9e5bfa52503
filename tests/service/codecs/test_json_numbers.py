"""Numbers that a compiled reader takes are what a parser makes of them, and nothing waits for its compiler."""

import subprocess
import sys

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.codecs import json_numbers
from service.codecs.json_tensors import to_array
from service.datatypes import BOOL, BYTES, DATATYPES, Datatype
from service.errors import PayloadMalformedError
from tests.service.codecs.strategies import assert_same_bits

FLOATS = [row for row in DATATYPES if row.is_float]
INTEGERS = [row for row in DATATYPES if not row.is_float and row not in (BOOL, BYTES)]
limits = st.sampled_from([2**bits + offset for bits in (7, 8, 15, 16, 31, 32, 63, 64) for offset in (-1, 0)])
numbers = (
    st.floats(allow_nan=False, allow_infinity=False).map(repr)
    | st.sampled_from([65504, 65519.99, 65520, 3.3895e38, 3.3961e38, 3.4028235e38, 3.4028236e38, 1e-45]).map(repr)
    | (limits | limits.map(int.__neg__) | st.integers(-9, 9)).map(str)
    | st.sampled_from(
        ["-0", "-0.0", "1e400", "1e-400", "NaN", "null", "true", '"1"', "01", "0.10000000000000000000001"]
    )
)


@pytest.fixture(autouse=True, scope="module")
def _compiled() -> None:
    json_numbers.warm_up()


@settings(deadline=None, max_examples=400)
@given(texts=st.lists(numbers, min_size=1, max_size=4), datatype=st.sampled_from(DATATYPES))
def test_what_is_read_is_what_the_parser_makes_of_it(texts: list[str], datatype: Datatype) -> None:
    found = json_numbers.read(memoryview(",".join(texts).encode()), datatype)
    if found is None:
        return
    expected = to_array(orjson.loads(f"[{','.join(texts)}]"), datatype, (len(texts),), field="x")
    assert_same_bits(found, expected)


@pytest.mark.parametrize("datatype", FLOATS, ids=lambda row: row.name)
def test_tensors_as_programs_write_them_are_read(datatype: Datatype) -> None:
    with np.errstate(over="ignore"):
        values = np.random.default_rng(0).standard_normal((300, 4)).astype(datatype.numpy)
    wide = values.astype(np.float64)
    for text in (str(wide.tolist()), orjson.dumps(wide, option=orjson.OPT_SERIALIZE_NUMPY).decode()):
        found = json_numbers.read(memoryview(text.encode())[1:-1], datatype)
        assert found is not None
        assert_same_bits(found, values)


@pytest.mark.parametrize("datatype", INTEGERS, ids=lambda row: row.name)
def test_integers_are_read_up_to_their_limits(datatype: Datatype) -> None:
    bounds = np.iinfo(datatype.numpy)
    least, most = max(bounds.min, 1 - 2**63), min(bounds.max, 2**63 - 1)
    found = json_numbers.read(memoryview(f"{least},0,{most}".encode()), datatype)
    assert found is not None
    assert found.dtype == datatype.numpy
    assert found.tolist() == [least, 0, most]
    for refused in (bounds.min - 1, bounds.max + 1):
        assert json_numbers.read(memoryview(str(refused).encode()), datatype) is None
        with pytest.raises(PayloadMalformedError):
            to_array([refused], datatype, (1,), field="x")


def test_nothing_waits_for_the_compiler() -> None:
    """In a process of its own: in this one it is compiled."""
    script = """if True:
        from service.codecs import json_numbers
        from service.datatypes import FP32
        print(json_numbers.read(memoryview(b"1.5"), FP32))
        json_numbers.warm_up()
        print(json_numbers.read(memoryview(b"1.5"), FP32))
    """
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stdout == "None\n[1.5]\n", done.stderr
