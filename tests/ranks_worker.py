"""What every process of tests/test_many_processes.py does: `ranks_worker.py SCENE PAIR OUTPUT`, under any launcher."""

import os
import resource
import signal
import sys
import time
from pathlib import Path

from lox_hf import LoxConfig, LoxError, harden_checkpoint
from lox_hf.parallel.ranks import Ranks, join_ranks

LOST_AFTER_S = 4.0


def harden(ranks: Ranks, scene: str, pair: Path, output: Path) -> None:
    """Harden; process 1 is the one to which something happens."""
    base, settings = str(pair / "base"), {"svd": "exact"} if scene == "slow" else {}
    if scene == "elsewhere":
        os.chdir(output.parent if ranks.rank == 0 else pair)
        output = Path(output.name)
    if scene == "first frozen" and ranks.rank == 0:
        os.kill(os.getpid(), signal.SIGSTOP)
    if scene == "stopped while publishing" and ranks.rank == 0:
        stop_in_publish()
    if ranks.rank == 1:
        if scene == "other settings":
            settings = {"r": 2, "alpha": 0.5}
        if scene == "other files":
            base = str(pair / "other")
        if scene == "no files":
            base = str(pair / "missing")
        if scene == "full disk":
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        if scene == "frozen":
            os.kill(os.getpid(), signal.SIGSTOP)
    report = harden_checkpoint(pair / "aligned", output, LoxConfig(base, **settings), ranks=ranks)
    print(ranks.rank, len(report.tensors), flush=True)


def stop_in_publish() -> None:
    """Have a SIGTERM come as the folder is about to be renamed."""
    rename = os.rename

    def stopped(source: Path, target: Path) -> None:
        if target.name == "out":
            os.kill(os.getpid(), signal.SIGTERM)
        rename(source, target)

    os.rename = stopped


def main() -> int:
    """Run the scene; a LoxError ends the process with its message, as in the command."""
    scene, pair, output = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    try:
        if scene == "absent" and os.environ["RANK"] == "1":
            time.sleep(60)
        with join_ranks(lost_after_s=1.0 if scene == "absent" else LOST_AFTER_S) as ranks:
            harden(ranks, scene, pair, output)
    except LoxError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
