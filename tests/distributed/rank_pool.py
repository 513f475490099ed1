"""Processes that stay alive between tests and execute a function as the ranks of a run."""

import multiprocessing
import os
import socket
import traceback
from multiprocessing.connection import wait
from pathlib import Path

import torch

HERE = Path(__file__).parent
PYTHONPATH = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])


def serve(requests):
    """Execute the requests of a connection: environment, function, arguments."""
    from flowgrain.distributed import destroy_process_group

    torch.set_num_threads(1)
    while (request := requests.recv()) is not None:
        environment, function, arguments = request
        os.environ |= environment
        try:
            result = function(*arguments)
            requests.send((None, result if environment["RANK"] == "0" else None))
        except BaseException:
            requests.send((traceback.format_exc(), None))
        destroy_process_group()
    os._exit(0)


class RankPool:
    """`size` processes, forked from a server that has imported torch."""

    def __init__(self, size):
        self.size, self.ranks = size, []

    def start(self):
        """Start the processes that do not run yet."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["rank_work"])
        while len(self.ranks) < self.size:
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self.ranks.append((process, ours))

    def run(self, size, function, *arguments, machines=1, timeout=150):
        """What `function(*arguments)` returns on rank 0 of `size` ranks.

        With several machines, every rank is told that the ranks are on as many machines.

        Raises:
            AssertionError: a rank failed, with its traceback. All processes are killed then.
        """
        self.start()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        here = size // machines
        waiting = {}
        for rank, (_, connection) in enumerate(self.ranks[:size]):
            environment = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank % here),
                "WORLD_SIZE": str(size),
                "LOCAL_WORLD_SIZE": str(here),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
            connection.send((environment, function, arguments))
            waiting[connection] = rank
        result = None
        while waiting:
            ready = wait(list(waiting), timeout)
            if not ready:
                self.kill()
                raise AssertionError(f"ranks {sorted(waiting.values())} did not finish")
            for connection in ready:
                rank = waiting.pop(connection)
                try:
                    error, value = connection.recv()
                except EOFError:
                    error, value = "the process ended", None
                if error is not None:
                    self.kill()
                    raise AssertionError(f"rank {rank}: {error}")
                result = value if rank == 0 else result
        return result

    def kill(self):
        """Kill all processes, because a rank may wait for another one."""
        for process, connection in self.ranks:
            process.kill()
            process.join()
            connection.close()
        self.ranks = []

    def close(self):
        """End the processes."""
        for process, connection in self.ranks:
            connection.send(None)
            process.join(10)
        self.kill()
