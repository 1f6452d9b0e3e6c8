"""A stage in several processes of this machine, one a GPU, under torch's own launcher.

`accelerate launch -m stages.sft` or `torchrun -m stages.sft` do the same from outside, on several machines too.
"""

import logging
import os
import signal
import sys
import uuid
from typing import NoReturn


def launch(module: str, processes: int) -> NoReturn:
    """Run `python -m module` in so many processes and end with the exit code of the first that failed, else 0.

    Each process has reported its own error when this returns, so torch's report of who failed is left out.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        max_restarts=0,
        signals_to_handle="SIGTERM,SIGINT,SIGHUP",
    )
    try:
        elastic_launch(config, sys.executable)("-m", module)
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        sys.exit(failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode)
    except SignalException as error:
        sys.exit(130 if error.sigval == signal.SIGINT else 128 + int(error.sigval))
    sys.exit(0)
