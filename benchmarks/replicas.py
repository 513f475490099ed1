"""Several reward servers: time of a scoring call by number of servers, and with hedged requests.

    python benchmarks/replicas.py

The servers wait instead of computing, one request at a time, as `flowgrain serve` does. A server
that stalls waits 20 times as long in one of 20 requests.
"""

import http.server
import json
import random
import statistics
import threading
import time

import torch

from flowgrain.data import as_prompts
from flowgrain.rewards.remote import Remote

SECONDS, STALLED = 0.1, 20
REQUESTS, REPEATS = 16, 7
IMAGES = torch.rand(REQUESTS, 3, 8, 8)
PROMPTS = as_prompts(["a"] * REQUESTS)


def start(seed, stalls):
    """The address of a server."""
    lock, chance = threading.Lock(), random.Random(seed)

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_GET(self):
            self.send({"rewards": ["wait"], "identities": {"wait": {"name": "wait"}}})

        def do_POST(self):
            count = len(json.loads(self.rfile.read(int(self.headers["Content-Length"])))["prompts"])
            with lock:
                time.sleep(SECONDS * (STALLED if stalls and chance.random() < 1 / 20 else 1))
            self.send({"scores": [1.0] * count})

        def send(self, content):
            body = json.dumps(content).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *_: None  # a request whose hedge was faster was cancelled
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_address[1]}"


def main():
    quick = [start(seed, stalls=False) for seed in range(4)]
    rewards = {n: Remote(quick[:n], "wait", request_size=1) for n in (1, 2, 4)}
    times = {n: [] for n in rewards}
    for _ in range(REPEATS):
        for n, reward in rewards.items():  # in turn, so that load of the machine affects all
            begin = time.perf_counter()
            reward(IMAGES, PROMPTS)
            times[n].append(time.perf_counter() - begin)
    for n, values in times.items():
        ratio = statistics.median(t / one for t, one in zip(values, times[1], strict=True))
        print(f"{n} servers: {statistics.median(values):.2f} s, {ratio:.2f} of one server")

    for hedge_after in ("never", "p95", 0.3):
        uneven = [start(1, stalls=True), *quick[:2]]  # the same stalls each time
        reward = Remote(uneven, "wait", request_size=1, hedge_after=hedge_after)
        values = []
        for _ in range(REPEATS * 3):
            begin = time.perf_counter()
            reward(IMAGES, PROMPTS)
            values.append(time.perf_counter() - begin)
        hedges = sum(replica.hedges for replica in reward.server.replicas)
        sent = sum(replica.requests for replica in reward.server.replicas)
        print(
            f"3 servers, one stalls, hedge_after={hedge_after}: "
            f"mean {statistics.mean(values):.2f} s, longest {max(values):.2f} s, "
            f"{hedges} of {sent} requests hedged"
        )


if __name__ == "__main__":
    main()
