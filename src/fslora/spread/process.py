"""A worker process: one base, and whatever chunks of clients it is asked to train (see `fslora.spread.pool`).

Frames come on standard input and are answered on standard output. The process ends with its input, at once: no worker
outlives its parent. Data and base are kept for the next run that needs the same.
"""

from __future__ import annotations

import os
import sys
import traceback
from contextlib import ExitStack
from queue import SimpleQueue
from threading import Thread

import torch

from fslora.clients import Clients
from fslora.config import build, parse_toml
from fslora.memory import forget_peak_memory, keep_freed_memory, peak_memory, release_memory
from fslora.prepare import Workshop
from fslora.rounds import wire_of
from fslora.spread.frames import Frame, receive, send
from fslora.spread.letters import answers_letter, changes_of, error_letter, requests_of


class Worker:
    """Answers frames."""

    def __init__(self) -> None:
        self.workshop = Workshop()
        self.base = ExitStack()
        """Open while the base is as the newest round has it."""

    def answer(self, frame: Frame) -> Frame | None:
        """Returns what a frame is answered with; None where it is of a round, which its chunks will ask about."""
        kind = frame.head["kind"]
        if kind == "setup":
            return self.setup(frame)
        if kind == "round":
            self.begin(frame)
            return None
        requests, memories = requests_of(frame, self.clients.trainers)
        rng = self.clients.federation.rng.child("round", self.number)
        answers = self.clients.answers(requests, memories, self.method, rng, self.lr)
        return answers_letter(answers, peak_memory())

    def setup(self, frame: Frame) -> Frame:
        """Prepares a run; answers with the partition's digest, which has to be that of the run."""
        self.base.close()
        forget_peak_memory()
        experiment = build(parse_toml(frame.head["experiment"]), source="a worker's experiment")
        federation = self.workshop.federation(experiment)
        self.method, self.clients = experiment.method, Clients(federation, wire_of(federation))
        return Frame({"digest": federation.sites.partition.digest})

    def begin(self, frame: Frame) -> None:
        """Brings the base to where it is in a round."""
        self.base.close()
        self.number, self.lr = frame.head["number"], frame.head["lr"]
        if self.number % self.clients.federation.experiment.run.eval_every == 0:
            release_memory()  # as often as the run does
        changes = changes_of(frame)
        self.base.enter_context(self.clients.federation.base.changed(changes.layers if changes else {}))


def main() -> None:
    """Answers frames until there are no more."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    keep_freed_memory()
    frames: SimpleQueue[Frame] = SimpleQueue()
    Thread(target=_listen, args=(frames,), daemon=True).start()
    with os.fdopen(os.dup(1), "wb") as answers:
        os.dup2(2, 1)  # whatever a library prints must not be taken for an answer
        worker = Worker()
        while True:
            try:
                answer = worker.answer(frames.get())
            except Exception as error:
                answer = error_letter(error, traceback.format_exc())
            if answer is not None:
                send(answers, answer)


def _listen(frames: SimpleQueue[Frame]) -> None:
    """Hands on what comes; ends the process where nothing can come any more, whatever it is doing."""
    try:
        while True:
            frames.put(receive(sys.stdin.buffer))
    except EOFError:
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
