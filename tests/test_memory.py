"""Memory that is given back between rounds: in a process of its own, because it is the process's heap."""

from __future__ import annotations

import subprocess
import sys

import pytest

GROWS = """
import torch
from fslora.memory import Heap, keep_freed_memory, resident

keep_freed_memory()
heap = Heap()
heap.settle()
blocks = [torch.ones(2**20) for _ in range(100)]  # 400 MB
before = resident()
del blocks[::2], blocks[1::2]
heap.settle()
after = resident()
alike = [torch.ones(2**20) for _ in range(5)]
del alike
heap.settle()
kept = resident()
heap.settle()
print((before - after) // 2**20, (kept - resident()) // 2**20)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_gaps_go_back_to_the_system_and_what_every_round_takes_stays() -> None:
    done = subprocess.run([sys.executable, "-c", GROWS], capture_output=True, text=True, check=True, timeout=120)
    gaps, usual = map(int, done.stdout.split())
    assert gaps > 150
    assert usual == 0
