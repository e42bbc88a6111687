"The training process for tests, forked from a server that has the heavy imports behind it: a start takes a tenth of a second."
import multiprocessing, os, sys
import accelerate, diffusers, transformers
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
