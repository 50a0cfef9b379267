"""How a run ends before its time: Ctrl-C and SIGTERM stop it after the current step, with a checkpoint."""

from __future__ import annotations

import logging
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType, ModuleType, SimpleNamespace
from typing import Any

import torch
from transformers import TrainerCallback

from kt_sft import env
from kt_sft.errors import KTError
from kt_sft.integrations.llamafactory import autoload

logger = logging.getLogger(__name__)

_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# torchrun passes a signal on that the terminal has sent to the ranks as well: that is one wish, not two.
_SAME_WISH_SECONDS = 2.0
_FROM_TERMINAL = 0x80  # SI_KERNEL: every process of the foreground group has got it


class Interrupted(KTError):
    """The run has been stopped from outside; the message says how to go on.

    Args:
        signum: the signal that stopped it.
    """

    def __init__(self, signum: int, message: str):
        super().__init__(message)
        self.status = 128 + signum


class Stop(TrainerCallback):
    """Ends training after the step in which a signal came, on all ranks after the same one, and saves there."""

    def __init__(self) -> None:
        self.signum: int | None = None
        self.at_step: int | None = None
        self._since = 0.0

    def on_signal(self, signum: int, frame: FrameType | None) -> None:
        """Note the wish; a second one ends the process at once."""
        now = time.monotonic()
        if self.signum is None:
            self.signum, self._since = signum, now
            if env.local_rank() == 0:
                again = "; Ctrl-C again: at once, without" if signum == signal.SIGINT else ""
                logger.warning("kt_sft: stopping after this step, with a checkpoint%s", again)
        elif now - self._since > _SAME_WISH_SECONDS:
            raise Interrupted(signum, "stopped at once, without a checkpoint of the last steps")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._stop_if_asked(args, state, control)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._stop_if_asked(args, state, control)

    def _stop_if_asked(self, args: Any, state: Any, control: Any) -> None:
        signum = self.signum or 0
        if args.world_size > 1:
            asked = torch.tensor(signum, device=args.device)
            torch.distributed.all_reduce(asked, op=torch.distributed.ReduceOp.MAX)
            signum = int(asked)
        if signum and state.global_step < state.max_steps:
            self.signum, self.at_step = signum, state.global_step
            args.save_only_model = False  # who stops a run wants to go on with it
            control.should_save = control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End the run here: at its regular end the trainer would delete the last checkpoint for a better one."""
        if self.at_step is None:
            return
        checkpoint = Path(args.output_dir) / f"checkpoint-{self.at_step}"
        steps = f"stopped after step {self.at_step} of {state.max_steps}"
        if not checkpoint.is_dir():
            raise Interrupted(self.signum, f"{steps}, and its checkpoint could not be written")
        raise Interrupted(self.signum, f"{steps}; go on with: {resuming_command(sys.argv, checkpoint)}")


@contextmanager
def stopping(trainer: Any) -> Iterator[None]:
    """Within it, signals stop a trainer's training by `Stop`.

    Raises:
        Interrupted: it was stopped, and its checkpoint is written.
    """
    if threading.current_thread() is not threading.main_thread():  # only that one hears of signals
        yield
        return
    stop = Stop()
    trainer.add_callback(stop)
    before = {signum: signal.signal(signum, stop.on_signal) for signum in _heard()}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
        trainer.remove_callback(stop)


def _heard() -> list[signal.Signals]:
    """The signals that stop a run, without those that whoever started it has switched off, as `nohup` does."""
    return [signum for signum in _STOPPING if signal.getsignal(signum) is not signal.SIG_IGN]


def resuming_command(argv: Sequence[str], checkpoint: Path, *, processes: int | None = None) -> str:
    """The command line that goes on from a checkpoint, or the key if this process was not started by one.

    Args:
        argv: of this process, in which `llamafactory-cli` leaves the words after `train`.
        processes: ranks that torchrun started; None: by the environment.
    """
    if Path(argv[0]).name not in ("llamafactory-cli", "lmf", "cli.py", "launcher.py"):
        return f"resume_from_checkpoint: {checkpoint}"
    words, key = list(argv[1:]), "resume_from_checkpoint"
    as_options = bool(words) and words[0].startswith("--")
    kept = [word for word in words if not word.startswith((f"{key}=", f"--{key}="))]
    if f"--{key}" in kept:
        at = kept.index(f"--{key}")
        has_value = at + 1 < len(kept) and not kept[at + 1].startswith("--")
        del kept[at : at + 1 + has_value]
    kept += [f"--{key}", str(checkpoint)] if as_options else [f"{key}={checkpoint}"]
    processes = env.local_world_size() if processes is None else processes
    ranks = f" FORCE_TORCHRUN=1 NPROC_PER_NODE={processes}" if processes > 1 else ""
    return f"USE_KT=1{ranks} llamafactory-cli train {shlex.join(kept)}"


def patch_launcher(launcher: ModuleType) -> None:
    """`subprocess`: a signal to `llamafactory-cli` reaches torchrun, and through it the ranks."""
    autoload.require(launcher, "subprocess", "launch")
    launcher.subprocess = SimpleNamespace(run=run_passing_signals)


def run_passing_signals(command: Sequence[str], *, env: dict[str, str], check: bool) -> subprocess.CompletedProcess:
    """`subprocess.run` of torchrun that ends when the child has ended, whatever signal comes; each is passed on once.

    Raises:
        SystemExit: the child has ended by a signal, or failed, and its ranks have said why.
    """
    watched = set(_heard())
    # Before there is a child: a signal that comes while it starts waits here. The child does not keep them blocked.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, watched | {signal.SIGCHLD})
    seen: set[int] = set()
    try:
        unblock = partial(signal.pthread_sigmask, signal.SIG_SETMASK, before)
        child = subprocess.Popen(command, env=env, preexec_fn=unblock)
        while child.poll() is None:
            came = signal.sigtimedwait(watched | {signal.SIGCHLD}, 1.0)
            if came is None or came.si_signo == signal.SIGCHLD:
                continue
            # torchrun would leave its ranks behind at a second one, in the middle of ending them.
            if came.si_signo not in seen and came.si_code != _FROM_TERMINAL:
                child.send_signal(came.si_signo)
            seen.add(came.si_signo)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    if seen and child.returncode != 0:
        raise SystemExit(128 + min(seen))
    if check and child.returncode != 0:
        raise SystemExit(child.returncode if child.returncode > 0 else 128 - child.returncode)
    return subprocess.CompletedProcess(command, child.returncode)
