"""The training process for tests.

It is forked from a server that has imported the heavy modules, so it starts in a tenth of a second.
It can be made to fail: see `inject_fault`.
"""

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

import accelerate  # noqa: F401 (imported here, so that no forked process needs the time)
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
import deepspeed.runtime.zero.stage_1_and_2  # noqa: F401
from diffusers import AutoencoderTiny, DPMSolverMultistepScheduler, UNet2DConditionModel  # noqa: F401

import flowerdiff.training.worker


def run_in_process(root, folder, fault, env):
    os.environ.update(env)
    inject_fault(*fault)
    sys.exit(flowerdiff.training.worker.run_worker(root, folder))


def start(root, folder='', fault=(), **env):
    """Start a process that trains in a workspace.

    `folder` is that of the run; '' derives it from the settings. The process has `pid`, `kill()`, `exitcode`.
    """
    here = str(Path(__file__).parent)  # where the server finds this module
    os.environ['PYTHONPATH'] = os.pathsep.join([here, *filter(None, [os.environ.get('PYTHONPATH')])])
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['train_worker'])
    process = context.Process(target=run_in_process, args=(str(root), str(folder), fault, env))
    process.start()
    return process


def some_steps(root, folder, upto, env):
    "Train to a step as one of the ranks, save a checkpoint, and write down what this rank saw and held."
    os.environ.update(env)
    import flowerdiff.training.trainer as trainer_module
    from flowerdiff.core.workspace import open_workspace
    from flowerdiff.data.batches import load_split
    from flowerdiff.training.checkpoints import Saver, load_run, save_run

    make_batch = trainer_module.make_batch
    pictures = []

    def recording_make_batch(*args, **kwargs):
        batch = make_batch(*args, **kwargs)
        pictures.append(batch.pictures.tolist())
        return batch

    trainer_module.make_batch = recording_make_batch
    ws = open_workspace(root)
    trainer, _ = flowerdiff.training.worker.start_run(
        ws, load_split(ws.encoded, 'train'), flowerdiff.training.worker.start_engine(ws.settings.train)
    )
    first_step = load_run(trainer, Path(folder))
    losses = []
    while trainer.step < upto:
        trainer.try_step()
        sums, counts = trainer.engine.mean(trainer.loss_meter.sums).tolist()
        losses.append(sum(sums) / sum(counts))
    saver = Saver(Path(folder))
    save_run(trainer, saver)
    saver.finish(wait=True)
    trainer.engine.wait()
    facts = dict(first_step=first_step, losses=losses, pictures=pictures, **memory_facts(trainer))
    Path(f'{folder}-{upto}-{trainer.engine.rank}.json').write_text(json.dumps(facts), encoding='utf-8')
    trainer.engine.wait()
    trainer.engine.close()


def memory_facts(trainer):
    "What a rank holds: the kind of its engine, and the sizes of master weights, optimizer state and EMA."
    engine = trainer.engine
    has_shards = hasattr(engine, 'masters')
    masters = engine.masters() if has_shards else dict(engine.net.named_parameters())
    averages = [state['exp_avg'] for state in engine.optimizer.state.values() if 'exp_avg' in state]

    def size(tensors):
        return sum(getattr(v, '_local_tensor', v).numel() for v in tensors)

    return dict(
        kind=type(engine).__name__,
        masters=size(masters.values()),
        optimizer=size(averages),
        ema=sum(v.numel() for v in trainer.ema.mean),
    )


def ranks(target, *args, n=1, timeout=400):
    "Run `target(*args, env)` in n processes with the variables of torchrun. All must exit with 0."
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['train_worker'])
    processes = []
    for rank in range(n):
        env = dict(
            OMP_NUM_THREADS='1',
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(n),
            MASTER_ADDR='127.0.0.1',
            MASTER_PORT=str(port),
        )
        processes.append(context.Process(target=target, args=(*args, env)))
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes == [0] * n, codes


# ---- faults


def inject_fault(kind='', *numbers):
    """Make this process fail while it writes checkpoints.

    kill k: SIGKILL at the k-th operation on the disk: before it, after it, or in the middle of a write.
    full k: every k-th operation finds the disk full.
    size n: SIGXFSZ in the write that makes a file longer than n bytes, in the middle of a file of tensors.
    memory mb: limit the address space to this much more than now.
    stop n: ask to stop after n steps.
    """
    if kind == 'stop':
        answers = iter([False] * (numbers[0] - 1) + [True])
        flowerdiff.training.worker.StopSignal.__call__ = lambda self: next(answers)
    if kind in ('kill', 'full'):
        DiskOperations(kind, *numbers).watch()
    if kind == 'size':
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, numbers * 2)
    if kind == 'memory':
        limit_memory(numbers[0])


def limit_memory(megabytes):
    "Limit the address space to this much more than now."
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD: freed memory is returned, so that the limit is on memory in use
    mallopt(-8, 1)  # M_ARENA_MAX: no thread reserves addresses of its own
    pages = int(Path('/proc/self/statm').read_text(encoding='utf-8').split()[0])
    limit = pages * resource.getpagesize() + (megabytes << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


class DiskOperations:
    "Counts the operations on checkpoint files, and fails at one of them."

    def __init__(self, kind, k):
        self.kind = kind
        self.k = k
        self.count = 0

    def at(self, moment, path):
        "Count a moment, and fail if it is the one."
        if isinstance(path, int):
            path = os.readlink(f'/proc/self/fd/{path}')
        if 'checkpoints' not in Path(os.fsdecode(path)).parts:
            return
        self.count += 1
        if self.kind == 'kill' and self.count == self.k:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.kind == 'full' and not self.count % self.k and moment.startswith('before'):
            raise OSError(errno.ENOSPC, 'No space left on device', str(path))

    def around(self, module, name, which=0):
        "Count two moments: before a function and after it."
        function = getattr(module, name)

        def counted(*args, **kwargs):
            path = args[which]
            if kwargs.get('dir_fd') is not None:
                path = os.path.join(os.readlink(f'/proc/self/fd/{kwargs["dir_fd"]}'), path)
            if isinstance(path, int):
                path = os.readlink(f'/proc/self/fd/{path}')
            self.at(f'before {name}', path)
            result = function(*args, **kwargs)
            self.at(f'after {name}', path)
            return result

        setattr(module, name, counted)

    def watch(self):
        "Count every operation of this process."
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
