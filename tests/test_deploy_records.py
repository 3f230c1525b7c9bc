"""Records: nothing is lost for any type and shape, and what contradicts itself is refused before a tensor is made."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fslora.deploy.envelope import VERSION, Entry, Record
from fslora.deploy.records import TYPES, Limits, to_payload, to_record
from fslora.errors import WireError
from fslora.wire import Payload

names = st.text(st.characters(codec="utf-8", categories=["L", "N", "P"]), min_size=1, max_size=20)
shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)


@st.composite
def tensors(draw) -> torch.Tensor:
    """Any bits at all, NaNs with payloads and negative zeros included; sometimes not contiguous."""
    dtype = TYPES[draw(st.sampled_from(sorted(TYPES)))]
    shape = draw(shapes)
    size = torch.Size(shape).numel() * dtype.itemsize
    data = draw(st.binary(min_size=size, max_size=size))
    data = bytes(byte % 2 for byte in data) if dtype == torch.bool else data
    if not size:
        return torch.empty(shape, dtype=dtype)
    made = torch.frombuffer(bytearray(data), dtype=dtype).reshape(shape)
    return made.T if made.dim() == 2 and draw(st.booleans()) else made


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@given(st.dictionaries(names, tensors(), max_size=6), st.text(max_size=50))
def test_nothing_is_lost(named, header):
    payload = Payload(named, header)
    record = to_record(payload)
    back = to_payload(record)
    assert back.header == header
    assert list(back.tensors) == list(named)
    for name, tensor in named.items():
        other = back.tensors[name]
        assert (other.dtype, other.shape, bits(other)) == (tensor.dtype, tensor.shape, bits(tensor))
    assert back.nbytes == payload.nbytes == sum(len(entry.data) for entry in record.entries)


GOOD = Entry("adapter/a:A/values", "float32", (2, 3), bytes(24))


def test_what_is_received_has_memory_of_its_own():
    record = Record((GOOD,), "{}")
    to_payload(record).tensors[GOOD.name].fill_(1)
    assert GOOD.data == bytes(24)


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        (replace(GOOD, data=bytes(23)), r"has 23 bytes; float32 \[2, 3\] takes 24"),
        (replace(GOOD, data=bytes(25)), "has 25 bytes"),
        (replace(GOOD, data="x" * 24), "has str bytes"),
        (replace(GOOD, shape=(2, -3)), "has shape"),
        (replace(GOOD, shape=(2**40, 2**40, 2**40)), "takes"),
        (replace(GOOD, shape=(2**60,)), "has shape"),
        (replace(GOOD, shape=(2, 3, 1, 1, 1)), "at most 4 sizes"),
        (replace(GOOD, shape=(2.0, 3)), "has shape"),
        (replace(GOOD, shape=(True, 6)), "has shape"),
        (replace(GOOD, shape=[2, 3]), "has shape"),
        (replace(GOOD, dtype="object"), "has type 'object'; there are float32"),
        (replace(GOOD, dtype="bool", data=b"\0\1\0\1\2\1"), "no bool"),
        (replace(GOOD, name=""), "is no name"),
        (replace(GOOD, name="a\nb"), "is no name"),
        (replace(GOOD, name="a" * 513), "is no name"),
        (replace(GOOD, name=7), "is no name"),
    ],
)
def test_an_entry_that_contradicts_itself_is_refused(entry, reason):
    with pytest.raises(WireError, match=reason):
        to_payload(Record((entry,), "{}"))


@pytest.mark.parametrize(
    ("record", "limits", "reason"),
    [
        (Record((GOOD,), "{}", VERSION + 1), Limits(), "install the same fslora on both sides"),
        (Record((GOOD,), "{}", None), Limits(), "version None"),
        (Record((GOOD,), "x" * 9), Limits(header=8), "header"),
        (Record((GOOD,), None), Limits(), "header"),
        (Record((GOOD, GOOD), "{}"), Limits(), "is in it twice"),
        (Record((GOOD, replace(GOOD, name="b")), "{}"), Limits(entries=1), "it has 2 arrays; there can be 1"),
        (Record((GOOD, replace(GOOD, name="b")), "{}"), Limits(nbytes=47), "with 'b' it has more than 47 bytes"),
    ],
)
def test_a_record_beyond_the_limits_is_refused(record, limits, reason):
    with pytest.raises(WireError, match=reason):
        to_payload(record, limits)


def test_a_type_that_does_not_travel_is_named():
    with pytest.raises(WireError, match=r"'x' has type torch\.complex64, which does not travel"):
        to_record(Payload({"x": torch.zeros(1, dtype=torch.complex64)}, ""))
