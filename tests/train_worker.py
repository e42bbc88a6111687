"The training process for tests, forked from a server that has the heavy imports behind it: a start takes a tenth of a second. It can be made to suffer: see `suffer`."
import ctypes, errno, multiprocessing, os, resource, signal, sys
from pathlib import Path
import accelerate, diffusers, transformers
from diffusers import AutoencoderKL, DDPMScheduler, DPMSolverMultistepScheduler, UNet2DConditionModel
import flowerdiff.checkpoints, flowerdiff.components, flowerdiff.stages.train

def go(root, folder, fault, env):
    os.environ.update(env)
    suffer(*fault)
    sys.exit(flowerdiff.stages.train.work(root, folder))

def start(root, folder='', fault=(), **env):
    "A process that trains in a workspace: `.pid`, `.kill()`, `.exitcode`. `folder` is the run's, '' to have it worked out."
    os.environ['PYTHONPATH'] = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get('PYTHONPATH')])])  # where the server finds this module
    context = multiprocessing.get_context('forkserver'); context.set_forkserver_preload(['train_worker'])
    p = context.Process(target=go, args=(str(root), str(folder), fault, env)); p.start()
    return p

# ---- faults

def suffer(kind='', *numbers):
    """Make this process fail while it writes checkpoints.
    kill k: SIGKILL at the k-th change of the disk: before or after it, or in the middle of a write.
    full k: every k-th change finds the disk full.
    size n: the system kills the process in the write that makes a file longer than n bytes (in the middle of a file of tensors).
    memory mb: so much more than now and no more.
    stop n: asked to stop after n steps."""
    if kind == 'stop': asked = iter([False]*(numbers[0] - 1) + [True]); flowerdiff.stages.train.Stop.__call__ = lambda self: next(asked)
    if kind in ('kill', 'full'): Changes(kind, *numbers).watch()
    if kind == 'size': signal.signal(signal.SIGXFSZ, signal.SIG_DFL); resource.setrlimit(resource.RLIMIT_CORE, (0, 0)); resource.setrlimit(resource.RLIMIT_FSIZE, numbers*2)
    if kind == 'memory':
        ctypes.CDLL(None).mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD: what is freed goes back, so that the limit is on what is in use
        now = int(Path('/proc/self/statm').read_text().split()[0])*resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + (numbers[0] << 20),)*2)

class Changes:
    "Counts what is done to the files of checkpoints, and fails there."
    def __init__(self, kind, k): self.kind, self.k, self.seen = kind, k, 0

    def at(self, what, path):
        "One more moment at which to fail, if it is in a checkpoint."
        if isinstance(path, int): path = os.readlink(f'/proc/self/fd/{path}')
        if 'checkpoints' not in Path(os.fsdecode(path)).parts: return
        self.seen += 1
        if self.kind == 'kill' and self.seen == self.k: os.kill(os.getpid(), signal.SIGKILL)
        if self.kind == 'full' and not self.seen % self.k and what.startswith('before'): raise OSError(errno.ENOSPC, 'No space left on device', str(path))

    def around(self, module, name, which=0):
        "Two moments: before a function and after it."
        real = getattr(module, name)
        def call(*args, **kwargs):
            path = args[which]
            if kwargs.get('dir_fd') is not None: path = os.path.join(os.readlink(f"/proc/self/fd/{kwargs['dir_fd']}"), path)
            told = os.readlink(f'/proc/self/fd/{path}') if isinstance(path, int) else path
            self.at(f'before {name}', told); out = real(*args, **kwargs); self.at(f'after {name}', told)
            return out
        setattr(module, name, call)

    def watch(self):
        import safetensors.torch
        for name in ('fsync', 'replace', 'mkdir', 'unlink', 'rmdir'): self.around(os, name)
        self.around(safetensors.torch, 'save_file', 1)
        def write_bytes(path, data):
            with open(path, 'wb', buffering=0) as f:
                self.at('before write', path); f.write(data[:len(data)//2]); self.at('within write', path); f.write(data[len(data)//2:]); self.at('after write', path)
        Path.write_bytes = write_bytes
