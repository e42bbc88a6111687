"""Measure an upload to a bucket: the first, the next without changes, and the memory it takes.

    python benchmarks/upload.py [--files 10000] [--kb 20] [--big 1000] [--folder] [--aws PATH]

`aws s3 sync` is measured too if it is installed. Each push is a process of its own. It talks to moto's
server, another process, whose own time is part of every first push. `--folder` sends to a folder instead
of the bucket.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
import uuid
from pathlib import Path

PUSH = """
import json, sys
from pathlib import Path
from flowerdiff.services import store as S
root, url = Path(sys.argv[1]), sys.argv[2]
with S.HashCache(root/'set', root/'work'/'hashes.json') as hashes:
    r = S.push(root/'set', S.open_store(url), hashed=hashes)
print(json.dumps(dict(sent=r['sent'], push=r['seconds'], read=hashes.read)))
"""


def timed(command, env):
    "Run a process. Returns (seconds, CPU seconds, peak memory in MB), and what it printed."
    start = time.perf_counter()
    with tempfile.TemporaryFile() as out:
        p = subprocess.Popen(command, stdout=out, env=env)
        _, status, used = os.wait4(p.pid, 0)
        p.returncode = status
        if status:
            raise SystemExit(f'{command[0]} ended with {status}')
        seconds = time.perf_counter() - start
        out.seek(0)
        return (seconds, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024), out.read().decode()


def make(root: Path, files: int, size: int):
    for i in range(files):
        f = root / 'set' / f'{i // 1000:03d}' / f'{i:06d}.bin'
        f.parent.mkdir(parents=True, exist_ok=True)
        with open(f, 'wb') as w:
            for _ in range(max(1, size >> 20)):
                w.write(os.urandom(min(size, 1 << 20)))


def serve():  # moto's server in a process of its own -> (process, address)
    code = "from moto.server import main; import sys; main(['-H', '127.0.0.1', '-p', sys.argv[1]])"
    port = 20000 + os.getpid() % 20000
    p = subprocess.Popen(
        [sys.executable, '-c', code, str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    url = f'http://127.0.0.1:{port}'
    for _ in range(200):
        try:
            urllib.request.urlopen(url, timeout=1)
            return p, url
        except OSError:
            time.sleep(0.1)
    raise SystemExit('moto did not start')


def row(what, seconds, cpu, memory, more):
    print(f'| {what} | {seconds:.1f} s | {cpu:.1f} s | {memory:.0f} MB | {more} |', flush=True)


def case(name, root, env, aws, local):
    for tool in ['ours', *(['aws s3 sync'] if aws and not local else [])]:
        bucket = f'b-{uuid.uuid4().hex}'
        url = str(root / bucket) if local else f's3://{bucket}'
        if not local:
            urllib.request.urlopen(
                urllib.request.Request(f'{env["AWS_ENDPOINT_URL"]}/{bucket}', method='PUT')
            ).close()  # moto checks no credentials
        for turn in ('first', 'again', 'a third time'):  # moto hashes its objects when it first lists them
            if tool == 'ours':
                used, out = timed([sys.executable, '-c', PUSH, str(root), url], env)
                r = json.loads(out.splitlines()[-1])
                row(
                    f'{name}, {tool}, {turn}',
                    *used,
                    f'{r["sent"]:,} objects sent, {r["read"]:,} files read, the push {r["push"]:.2f} s',
                )
            else:
                used, out = timed([aws, 's3', 'sync', '--no-progress', str(root / 'set'), url], env)
                row(f'{name}, {tool}, {turn}', *used, f'{out.count("upload:"):,} objects sent')


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--files', type=int, default=10_000)
    p.add_argument('--kb', type=int, default=20)
    p.add_argument('--big', type=int, default=1000, help='MB of the one big file; 0: none')
    p.add_argument('--folder', action='store_true')
    p.add_argument('--aws', default=shutil.which('aws'))
    a = p.parse_args()
    print('| | time | CPU time | peak memory | |\n|---|---|---|---|---|')
    base = {k: v for k, v in os.environ.items() if not k.startswith('AWS_')}
    for name, files, size in (
        (f'{a.files:,} files of {a.kb} KB', a.files, a.kb * 1000),
        (f'one file of {a.big} MB', 1, a.big * 1_000_000),
    ):
        if not size:
            continue
        server, url = (None, '') if a.folder else serve()
        env = base | dict(
            AWS_ACCESS_KEY_ID='a',
            AWS_SECRET_ACCESS_KEY='b',
            AWS_DEFAULT_REGION='us-east-1',
            AWS_ENDPOINT_URL=url,
        )
        root = Path(tempfile.mkdtemp())
        try:
            make(root, files, size)
            time.sleep(3)
            case(name, root, env, a.aws, a.folder)
        finally:
            if server:
                server.terminate()
                server.wait()
            shutil.rmtree(root)


if __name__ == '__main__':
    main()
