"""Memory that is given back between steps: in a process of its own, because it is the process's heap."""

from __future__ import annotations

import subprocess
import sys

import pytest

GROWS = """
import torch
from fslora.memory import Heap, keep_freed_memory, resident

def step(count):
    blocks = [torch.ones(2**18) for _ in range(count)]  # 1 MiB each
    del blocks[::2], blocks[1::2]

keep_freed_memory()
heap = Heap()
step(20)
heap.settle()
for _ in range(3):
    step(20)
    heap.settle()
alike = resident()
step(400)
grown = resident()
heap.settle()
left = resident()
step(400)
heap.settle()  # the usual from here on
usual = resident()
step(380)
heap.settle()
print(*((pages - alike) // 2**20 for pages in (grown, left, usual, resident())))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_gaps_go_back_to_the_system_and_what_every_step_takes_stays() -> None:
    done = subprocess.run([sys.executable, "-c", GROWS], capture_output=True, text=True, check=True, timeout=120)
    grown, left, usual, kept = map(int, done.stdout.split())
    assert grown > 300
    assert left < 30
    assert usual > 300
    assert kept == usual
