"""A Space: seconds from its start to the page and to the first picture, and the memory of its process.

    python benchmarks/space_memory.py WORKSPACE [--python PYTHON] [--rounds 3]

WORKSPACE was published to a folder. Its Space is written, and its app.py runs in a process of its own, once
for each round. The first picture is drawn by the API with the model's own steps, then ten more. PYTHON is the
interpreter of an environment that has only what the Space's requirements.txt names; without it, Gradio also
imports what happens to be installed here.
"""

import argparse
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil


def free_port() -> int:
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def measure(
    space: Path, python: str
) -> tuple:  # seconds to the page, to a picture, of computing, for the next; MB
    from gradio_client import Client

    port = free_port()
    began = time.perf_counter()
    server = subprocess.Popen(
        [python, 'app.py'],
        cwd=space,
        env={**os.environ, 'GRADIO_SERVER_PORT': str(port), 'PYTHONPATH': ''},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        line = server.stdout.readline()
        assert str(port) in line, line
        page = time.perf_counter() - began
        client = Client(f'http://127.0.0.1:{port}', verbose=False, analytics_enabled=False)

        def draw():
            client.predict(prompt='a red rose', seed=1, api_name='/generate')

        draw()
        first = time.perf_counter() - began
        process = psutil.Process(server.pid)
        computing = sum(process.cpu_times()[:2])
        again = time.perf_counter()
        for _ in range(10):
            draw()
        following = (time.perf_counter() - again) / 10
        return page, first, computing, following, process.memory_info().rss / 1e6
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(60)


def main():
    from gradio_client import Client  # noqa: F401  # not measured

    from flowerdiff.apps.hf_space import make_space

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('workspace')
    parser.add_argument('--python', default=sys.executable)
    parser.add_argument('--rounds', type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        space = make_space(args.workspace, Path(scratch) / 'space')
        print(f'load {os.getloadavg()[0]:.1f}; median of {args.rounds}\n')
        print('| page | first picture | CPU time until then | each next | memory |\n|---|---|---|---|---|')
        rounds = zip(*(measure(space, args.python) for _ in range(args.rounds)))
        page, first, computing, following, memory = map(statistics.median, rounds)
        times = f'{page:.1f} s | {first:.1f} s | {computing:.1f} s | {following:.2f} s'
        print(f'| {times} | {memory:.0f} MB |')


if __name__ == '__main__':
    main()
