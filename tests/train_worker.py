"The training process for tests, forked from a server that has the heavy imports behind it: a start takes a tenth of a second. It can be made to suffer: see `suffer`."

import ctypes
import errno
import json
import multiprocessing
import os
import resource
import signal
import socket
import sys
from pathlib import Path

import flowerdiff.models.components
import flowerdiff.training.checkpoints
import flowerdiff.training.worker


def go(root, folder, fault, env):
    os.environ.update(env)
    suffer(*fault)
    sys.exit(flowerdiff.training.worker.run_worker(root, folder))


def start(root, folder='', fault=(), **env):
    "A process that trains in a workspace: `.pid`, `.kill()`, `.exitcode`. `folder` is the run's, '' to have it worked out."
    os.environ['PYTHONPATH'] = os.pathsep.join(
        [str(Path(__file__).parent), *filter(None, [os.environ.get('PYTHONPATH')])]
    )  # where the server finds this module
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['train_worker'])
    p = context.Process(target=go, args=(str(root), str(folder), fault, env))
    p.start()
    return p


def some_steps(root, folder, upto, env):
    "Train to a step as one of the ranks, save a checkpoint, and write down what this rank saw and held."
    os.environ.update(env)
    import flowerdiff.training.trainer as trainer
    from flowerdiff.core.workspace import open_workspace
    from flowerdiff.data.batches import load_split

    make, pictures = trainer.make_batch, []

    def seen(*args):
        batch = make(*args)
        pictures.append(batch.pictures.tolist())
        return batch

    trainer.make_batch = seen
    ws = open_workspace(root)
    run, _ = flowerdiff.training.worker.start_run(ws, load_split(ws.encoded, 'train'))
    begun, losses = trainer.load_run(run, Path(folder)), []
    while run.step < upto:
        run.one()
        sums, n = run.engine.mean(run.sums).tolist()
        losses.append(sum(sums) / sum(n))
    saver = flowerdiff.training.checkpoints.Saver(Path(folder))
    trainer.save_run(run, saver)
    saver.finish(wait=True)
    run.engine.wait()
    held = run.engine.masters() if hasattr(run.engine, 'masters') else dict(run.engine.net.named_parameters())
    memory = [v for s in run.engine.optimizer.state.values() for k, v in s.items() if k == 'exp_avg']
    facts = dict(
        begun=begun,
        losses=losses,
        pictures=pictures,
        kind=type(run.engine).__name__,
        masters=sum(p.numel() for p in held.values()),
        memory=sum(v.numel() for v in memory),
        average=sum(v.numel() for v in run.ema.mean),
    )
    Path(f'{folder}-{upto}-{run.engine.rank}.json').write_text(json.dumps(facts))
    run.engine.wait()
    run.engine.close()


def ranks(target, *args, n=1, timeout=400):
    "Run `target(*args, env)` in n processes with torchrun's variables; each must end well."
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['train_worker'])
    env = lambda i: dict(
        OMP_NUM_THREADS='1',
        RANK=str(i),
        LOCAL_RANK=str(i),
        WORLD_SIZE=str(n),
        MASTER_ADDR='127.0.0.1',
        MASTER_PORT=str(port),
    )
    ps = [context.Process(target=target, args=(*args, env(i))) for i in range(n)]
    for p in ps:
        p.start()
    for p in ps:
        p.join(timeout)
    codes = [p.exitcode for p in ps]
    for p in ps:
        p.kill()
    assert codes == [0] * n, codes


# ---- faults


def suffer(kind='', *numbers):
    """Make this process fail while it writes checkpoints.
    kill k: SIGKILL at the k-th change of the disk: before or after it, or in the middle of a write.
    full k: every k-th change finds the disk full.
    size n: the system kills the process in the write that makes a file longer than n bytes (in the middle of a file of tensors).
    memory mb: so much more than now and no more.
    stop n: asked to stop after n steps."""
    if kind == 'stop':
        asked = iter([False] * (numbers[0] - 1) + [True])
        flowerdiff.training.worker.StopSignal.__call__ = lambda self: next(asked)
    if kind in ('kill', 'full'):
        Changes(kind, *numbers).watch()
    if kind == 'size':
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, numbers * 2)
    if kind == 'memory':
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(
            -3, 1 << 16
        )  # M_MMAP_THRESHOLD: what is freed goes back, so that the limit is on what is in use
        mallopt(-8, 1)  # M_ARENA_MAX: no thread reserves addresses of its own
        now = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + (numbers[0] << 20),) * 2)


class Changes:
    "Counts what is done to the files of checkpoints, and fails there."

    def __init__(self, kind, k):
        self.kind, self.k, self.seen = kind, k, 0

    def at(self, what, path):
        "One more moment at which to fail, if it is in a checkpoint."
        if isinstance(path, int):
            path = os.readlink(f'/proc/self/fd/{path}')
        if 'checkpoints' not in Path(os.fsdecode(path)).parts:
            return
        self.seen += 1
        if self.kind == 'kill' and self.seen == self.k:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.kind == 'full' and not self.seen % self.k and what.startswith('before'):
            raise OSError(errno.ENOSPC, 'No space left on device', str(path))

    def around(self, module, name, which=0):
        "Two moments: before a function and after it."
        real = getattr(module, name)

        def call(*args, **kwargs):
            path = args[which]
            if kwargs.get('dir_fd') is not None:
                path = os.path.join(os.readlink(f'/proc/self/fd/{kwargs["dir_fd"]}'), path)
            told = os.readlink(f'/proc/self/fd/{path}') if isinstance(path, int) else path
            self.at(f'before {name}', told)
            out = real(*args, **kwargs)
            self.at(f'after {name}', told)
            return out

        setattr(module, name, call)

    def watch(self):
        import safetensors.torch

        for name in ('fsync', 'replace', 'mkdir', 'unlink', 'rmdir'):
            self.around(os, name)
        self.around(safetensors.torch, 'save_file', 1)

        def write_bytes(path, data):
            with open(path, 'wb', buffering=0) as f:
                self.at('before write', path)
                f.write(data[: len(data) // 2])
                self.at('within write', path)
                f.write(data[len(data) // 2 :])
                self.at('after write', path)

        Path.write_bytes = write_bytes
