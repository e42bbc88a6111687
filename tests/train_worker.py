"The training process for tests, forked from a server that has the heavy imports behind it: a start takes a tenth of a second."
import json, multiprocessing, os, socket, sys
from pathlib import Path
import accelerate, deepspeed, diffusers, transformers
from diffusers import AutoencoderKL, DDPMScheduler, DPMSolverMultistepScheduler, UNet2DConditionModel
import flowerdiff.components, flowerdiff.stages.train

def go(root, env):
    os.environ.update(env)
    sys.exit(flowerdiff.stages.train.work(root))

def start(root, **env):
    "A process that trains in a workspace: `.pid`, `.kill()`, `.exitcode`."
    context = multiprocessing.get_context('forkserver'); context.set_forkserver_preload(['train_worker'])
    p = context.Process(target=go, args=(str(root), env)); p.start()
    return p

def some_steps(root, folder, upto, env):
    "Train to a step as one of the ranks, save a checkpoint, and write down what this rank saw and held."
    os.environ.update(env)
    import flowerdiff.trainer as trainer
    from flowerdiff.batches import load_split
    from flowerdiff.engine import optimizer_tensors
    from flowerdiff.workspace import open_workspace
    make, pictures = trainer.make_batch, []
    def seen(*args): batch = make(*args); pictures.append(batch.pictures.tolist()); return batch
    trainer.make_batch = seen
    ws = open_workspace(root)
    run, _ = flowerdiff.stages.train.start_run(ws, load_split(ws.encoded, 'train'))
    begun, losses = trainer.load_run(run, Path(folder)), []
    while run.step < upto: run.one(); losses.append(run.engine.mean(run.sum))
    trainer.save_run(run, Path(folder))
    held = run.engine.masters() if hasattr(run.engine, 'masters') else dict(run.engine.net.named_parameters())
    memory = [v for s in run.engine.optimizer.state.values() for k, v in s.items() if k == 'exp_avg']
    facts = dict(begun=begun, losses=losses, pictures=pictures, kind=type(run.engine).__name__, masters=sum(p.numel() for p in held.values()), memory=sum(v.numel() for v in memory), average=sum(v.numel() for v in run.ema.mean))
    Path(f'{folder}-{upto}-{run.engine.rank}.json').write_text(json.dumps(facts))
    run.engine.wait(); run.engine.close()

def ranks(target, *args, n=1, timeout=400):
    "Run `target(*args, env)` in n processes with torchrun's variables; each must end well."
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    context = multiprocessing.get_context('forkserver'); context.set_forkserver_preload(['train_worker'])
    env = lambda i: dict(OMP_NUM_THREADS='1', RANK=str(i), LOCAL_RANK=str(i), WORLD_SIZE=str(n), MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    ps = [context.Process(target=target, args=(*args, env(i))) for i in range(n)]
    for p in ps: p.start()
    for p in ps: p.join(timeout)
    codes = [p.exitcode for p in ps]
    for p in ps: p.kill()
    assert codes == [0]*n, codes
