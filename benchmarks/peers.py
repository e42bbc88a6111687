"""Compare the training throughput with two peers that train the same UNet.

    taskset -c 0 python benchmarks/peers.py --diffusers DIR [--channels 192,384,576] [--resolution 128]
        [--batch 16] [--rounds 3] [--threads 1] [--kept]

All sides use the same batch size, resolution and float32, and take turns after each step. The reference
loop does what aniketpoojari/Text-To-Image-Diffusion (c3f8ebb) does in each step, on a CPU instead of a
GPU: read a JPEG, encode it, load its CLIP embedding from a .pt file, drop the captions of the whole batch
or not, AdamW with clipping, average the weights, read the loss. Stock diffusers is its own training
script, unchanged. Each peer is a process of its own that waits while the others run. Ours keeps freed
memory as `flowerdiff run` does, the peers do with --kept. DIR is a clone of huggingface/diffusers, its
git directory, or the script. Without it only the first peer runs.

The autoencoder has the shape of Stable Diffusion's, the text encoder that of CLIP ViT-L/14, both with
random weights. Nothing is downloaded.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path

SCRIPT, LENGTH, WIDTH = (
    'examples/text_to_image/train_text_to_image.py',
    77,
    768,
)  # tokens and width of CLIP ViT-L/14
MIRRORED, EPOCHS = 2, 75  # encodings a picture of ours; epochs of the reference's recipe

# ---- the processes of the peers


def transforms():
    "Return what the script uses of torchvision.transforms, for PIL images: no torchvision fits CPU torch."
    import random

    import numpy as np
    import torch
    from PIL import Image, ImageOps

    def resize(side, interpolation):  # the shorter side
        return lambda p: (
            p
            if min(p.size) == side
            else p.resize([max(1, side * s // min(p.size)) for s in p.size], interpolation)
        )

    def crop(side, at):
        def cut(p):
            x, y = (int(at() * (s - side)) for s in p.size)
            return p.crop((x, y, x + side, y + side))

        return cut

    def compose(steps):
        def run(p):
            for f in steps:
                p = f(p)
            return p

        return run

    def to_tensor(p):
        return torch.from_numpy(np.asarray(p).copy()).permute(2, 0, 1).contiguous().float().div_(255)

    return types.SimpleNamespace(
        InterpolationMode=Image.Resampling,
        Resize=resize,
        CenterCrop=lambda side: crop(side, lambda: 0.5),
        RandomCrop=lambda side: crop(side, random.random),
        Compose=compose,
        RandomHorizontalFlip=lambda p=0.5: lambda x: ImageOps.mirror(x) if random.random() < p else x,
        Lambda=lambda f: f,
        ToTensor=lambda: to_tensor,
        Normalize=lambda mean, std: lambda x: x.sub_(mean[0]).div_(std[0]),
    )


def timed(kind, method, spent, name):  # adds the seconds of a class's method to spent[name]
    whole = getattr(kind, method)

    def f(*args, **kw):
        start = time.perf_counter()
        try:
            return whole(*args, **kw)
        finally:
            spent[name] += time.perf_counter() - start

    setattr(kind, method, f)


def teller():
    "What a peer calls at the end of a step: it tells what the step took and waits for its next turn."
    told, since = os.fdopen(os.dup(1), 'w'), [time.process_time()]
    os.dup2(2, 1)

    def tell(spent):
        print(json.dumps(spent | dict(cpu=time.process_time() - since[0])), file=told, flush=True)
        if not sys.stdin.readline():
            os._exit(0)
        since[0] = time.process_time()
        spent.update(dict.fromkeys(spent, 0.0))

    return tell


def drive_stock(script, args):
    "Run the script, unchanged; `Accelerator.log` is the last thing but one that it does in a step."
    import importlib.util
    import runpy

    import accelerate
    import diffusers
    import transformers

    if not importlib.util.find_spec('torchvision'):
        sys.modules['torchvision'] = types.SimpleNamespace(transforms=transforms())
    spent, tell, log = dict(autoencoder=0.0, text=0.0), teller(), accelerate.Accelerator.log
    timed(diffusers.AutoencoderKL, 'encode', spent, 'autoencoder')
    timed(transformers.CLIPTextModel, 'forward', spent, 'text')

    def step(self, *a, **kw):
        log(self, *a, **kw)
        tell(spent)

    accelerate.Accelerator.log = step
    sys.argv = [script, *args]
    runpy.run_path(script, run_name='__main__')


def drive_reference(folder, batch):
    import torch
    import torch.nn.functional as F
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from PIL import Image

    names, null, spent, tell = (
        sorted(p.stem for p in (folder / 'pictures').glob('*.jpg')),
        torch.load(folder / 'embeddings/null.pt', weights_only=True),
        dict(autoencoder=0.0),
        teller(),
    )
    vae, noise_scheduler = (
        AutoencoderKL.from_pretrained(folder / 'model/vae').eval(),
        DDPMScheduler.from_pretrained(folder / 'model/scheduler'),
    )
    net = UNet2DConditionModel.from_pretrained(folder / 'model/unet').train()
    opt = torch.optim.AdamW(net.parameters(), 2e-4, weight_decay=0.01, fused=True)
    side, t = 8 * net.config.sample_size, transforms()
    change = t.Compose(
        [
            t.Resize(side, Image.BILINEAR),
            t.RandomHorizontalFlip(),
            t.ToTensor(),
            t.Normalize([0.5] * 3, [0.5] * 3),
        ]
    )

    class Pictures(torch.utils.data.Dataset):
        def __len__(self):
            return len(names)

        def __getitem__(self, i):
            return change(Image.open(folder / f'pictures/{names[i]}.jpg').convert('RGB')), torch.load(
                folder / f'embeddings/{names[i]}.pt', weights_only=True
            )

    loader, weights = (
        torch.utils.data.DataLoader(Pictures(), batch, shuffle=True),
        dict(net.named_parameters()),
    )
    shadow = {k: p.data.clone() for k, p in weights.items()}
    timed(AutoencoderKL, 'encode', spent, 'autoencoder')
    while True:
        for pictures, text in loader:
            with torch.no_grad():
                latents = vae.encode(pictures).latent_dist.sample() * 0.18215
            ts, noise = torch.randint(0, 1000, (batch,)), torch.randn_like(latents)
            if torch.rand(1).item() < 0.15:
                text = null.unsqueeze(0).expand(batch, -1, -1)
            loss = F.mse_loss(
                net(
                    noise_scheduler.add_noise(latents, noise, ts),
                    ts,
                    encoder_hidden_states=text,
                    return_dict=False,
                )[0],
                noise,
            )
            loss.backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            opt.step()
            opt.zero_grad()
            with torch.no_grad():
                copied = {
                    k: p.data.cpu().float() for k, p in weights.items()
                }  # a copy where the weights are on a GPU, nothing here
                for k in shadow:
                    shadow[k].mul_(0.9999).add_(copied[k], alpha=1 - 0.9999)
            loss.item()
            tell(spent)


def fetched(where, folder):
    "Copy the script: from itself, a clone, or the newest fitting release in a git directory."
    from importlib.metadata import version

    from packaging.version import Version

    where, copy = Path(where), folder / Path(SCRIPT).name
    if (found := where if where.is_file() else where / SCRIPT).is_file():
        copy.write_text(found.read_text())
        return copy, str(where)

    def git(*a):
        return subprocess.run(['git', f'--git-dir={where}', *a], capture_output=True, text=True).stdout

    tags = [
        t
        for t in git('tag', '-l', 'v[0-9]*').split()
        if not set(t) & set('abcr') and Version(t) <= Version(version('diffusers'))
    ]
    tag = max(tags, key=Version, default='HEAD')
    if not (text := git('show', f'{tag}:{SCRIPT}')):
        sys.exit(
            f'peers: {where} has no {SCRIPT}; '
            'fetch https://github.com/huggingface/diffusers and give its folder, or that file'
        )
    copy.write_text(text)
    return copy, tag


# ---- what all sides train


def write_parts(folder, unet, a):
    "A pipeline's parts and pictures in imagefolder layout, with the reference's embedding files."
    import numpy as np
    import torch
    from diffusers import AutoencoderKL, DDPMScheduler
    from PIL import Image
    from transformers import CLIPTextConfig, CLIPTextModel

    from flowerdiff.models.components import load_text
    from flowerdiff.models.saving import save_tokenizer

    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    model, n = folder / 'model', 8 * a.batch
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=4,
        down_block_types=('DownEncoderBlock2D',) * 4,
        up_block_types=('UpDecoderBlock2D',) * 4,
        sample_size=512,
    )
    tokenizer = load_text('garden').tokenizer
    tokenizer.model_max_length = LENGTH
    text = CLIPTextModel(
        CLIPTextConfig(
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=12,
            num_attention_heads=12,
            max_position_embeddings=LENGTH,
            projection_dim=WIDTH,
        )
    )
    for part, m in dict(
        unet=unet,
        vae=vae,
        text_encoder=text,
        scheduler=DDPMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule='squaredcos_cap_v2'),
    ).items():
        m.save_pretrained(model / part)
    save_tokenizer(tokenizer, model / 'tokenizer')
    (folder / 'pictures').mkdir()
    (folder / 'embeddings').mkdir()
    with open(folder / 'pictures/metadata.jsonl', 'w', encoding='utf-8') as f:
        for i in range(n):
            Image.fromarray(rng.integers(0, 256, (12, 12, 3), np.uint8)).resize(
                (a.resolution,) * 2, Image.BICUBIC
            ).save(folder / f'pictures/{i:04d}.jpg', quality=90)
            torch.save(torch.randn(LENGTH, WIDTH), folder / f'embeddings/{i:04d}.pt')
            f.write(json.dumps(dict(file_name=f'{i:04d}.jpg', text='a red rose under a blue sky')) + '\n')
    torch.save(torch.randn(LENGTH, WIDTH), folder / 'embeddings/null.pt')


# ---- the sides: each a function that makes one step and returns what it knows of its parts, in seconds


def ours(s, make, size, folder):
    from flowerdiff.data.batches import toy_split
    from flowerdiff.services.tracking import log_event
    from flowerdiff.training.accelerator import Engine
    from flowerdiff.training.trainer import Trainer

    split = toy_split(512, kinds=64, size=size, width=WIDTH)
    split.texts = split.texts[:, :1].expand(-1, LENGTH, -1).contiguous()
    run = Trainer(s.train, 0, split, make, engine=Engine('fp32'))

    def step():
        start, numbers = time.process_time(), run.train_step()
        log_event(folder / 'events.jsonl', 'step', step=run.step, **run.pop_losses(force=True), **numbers)
        return dict(cpu=time.process_time() - start)

    return step


def peer(name, args, folder, kept):
    env = {k: v for k, v in os.environ.items() if kept or not k.startswith('MALLOC_')} | dict(
        HF_HUB_OFFLINE='1',
        HF_DATASETS_OFFLINE='1',
        HF_HOME=str(folder / 'hf'),
        TOKENIZERS_PARALLELISM='false',
    )
    log = folder / f'{name}.log'
    child = subprocess.Popen(
        [sys.executable, __file__, '--drive', name, *map(str, args)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log.open('w'),
        text=True,
        env=env,
    )

    def told():
        if not (line := child.stdout.readline()):
            sys.exit(f'peers: {name} stopped:\n{log.read_text()[-2000:]}')
        return json.loads(line)

    told()  # its first step, with everything that it loads

    def step():
        child.stdin.write('\n')
        child.stdin.flush()
        return told()

    return step, child


def stock_arguments(
    a, folder
):  # as in the script's own README, without its gradient checkpointing, with the faster average
    return [
        '--pretrained_model_name_or_path',
        folder / 'model',
        '--train_data_dir',
        folder / 'pictures',
        '--output_dir',
        folder / 'out',
        '--cache_dir',
        folder / 'cache',
        '--resolution',
        a.resolution,
        '--train_batch_size',
        a.batch,
        '--max_train_steps',
        10000,
        '--center_crop',
        '--random_flip',
        '--use_ema',
        '--foreach_ema',
        '--max_grad_norm',
        1,
        '--lr_scheduler',
        'constant',
    ]


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument('--diffusers')
    ap.add_argument('--channels', default='192,384,576')
    ap.add_argument('--kept', action='store_true')
    for name, n in (('resolution', 128), ('layers', 2), ('batch', 16), ('rounds', 3), ('threads', 1)):
        ap.add_argument(f'--{name}', type=int, default=n)
    a = ap.parse_args()
    from flowerdiff.services.processes import WORKER_ENV

    env = os.environ | WORKER_ENV | dict(OMP_NUM_THREADS=str(a.threads))
    if env != os.environ:
        os.execve(sys.executable, [sys.executable, *sys.argv], env)
    import torch
    import transformers

    from flowerdiff.core.profiles import load_profile
    from flowerdiff.models.components import build_denoiser

    torch.set_num_threads(a.threads)
    transformers.utils.logging.disable_progress_bar()
    channels = [int(c) for c in a.channels.split(',')]
    s = load_profile(
        'garden',
        {
            'train.channels': channels,
            'train.layers': a.layers,
            'train.attention': [False] + [True] * (len(channels) - 1),
            'train.attention_head_dim': 48 if channels[0] % 48 == 0 else 16,
            'train.batch_size': a.batch,
            'train.epochs': 1000.0,
        },
    )
    make, children, tag = lambda: build_denoiser(s, 4, WIDTH, a.resolution // 8), [], ''
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        runs = {'reference loop': ('reference', [folder, a.batch])}
        if a.diffusers:
            script, tag = fetched(a.diffusers, folder)
            runs['stock diffusers'] = 'stock', [script, *stock_arguments(a, folder)]
        net = make()
        weights = sum(p.numel() for p in net.parameters())
        write_parts(folder, net, a)
        del net
        sides = {'ours': ours(s, make, a.resolution // 8, folder)}
        sides['ours']()
        try:
            for k, (name, args) in runs.items():
                sides[k], child = peer(name, args, folder, a.kept)
                children.append(child)
                sides[k]()
            rows = {k: [] for k in sides}  # of each round: seconds, what the side knows
            for i in range(a.rounds):
                for k in list(sides)[:: 1 if i % 2 else -1]:
                    start = time.perf_counter()
                    parts = sides[k]()
                    rows[k].append((time.perf_counter() - start, parts))
                print(
                    f'round {i + 1} of {a.rounds}: '
                    + ', '.join(f'{k} {r[-1][0]:.1f} s' for k, r in rows.items()),
                    file=sys.stderr,
                    flush=True,
                )
        finally:
            for child in children:
                child.stdin.close()
                child.wait()
    malloc = "peers' malloc " + ('keeps memory as ours does' if a.kept else 'as it comes')
    what = [
        f'{weights / 1e6:.1f}M weights',
        f'channels {channels}',
        f'{a.resolution} px',
        f'batch {a.batch}',
        f'{a.threads} thread{"s" * (a.threads > 1)}',
        'fp32',
        f'{a.rounds} rounds',
        malloc,
    ]
    if tag:
        what.append(f'diffusers {tag}')
    report(rows, a, ', '.join(what))


def median_share(rows, part: str) -> float:
    "Return the median share of a part of the step."
    return statistics.median(parts.get(part, 0) / wall for wall, parts in rows)


def peer_row(name, mine, rows, batch) -> str:
    "Return the line of a peer in the table."
    ratios = [theirs[0] / ours[0] for theirs, ours in zip(rows, mine)]
    work = [theirs[1]['cpu'] / ours[1]['cpu'] for theirs, ours in zip(rows, mine)]
    our_rate = batch / statistics.median(wall for wall, _ in mine)
    rate = batch / statistics.median(wall for wall, _ in rows)
    cells = [
        name,
        f'{our_rate:.2f}',
        f'{rate:.2f}',
        f'{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})',
        f'{statistics.median(work):.2f}',
        f'{median_share(rows, "autoencoder"):.0%}',
        f'{median_share(rows, "text"):.0%}',
    ]
    return f'| {" | ".join(cells)} |'


def report(rows, a, what):
    mine = rows['ours']
    headings = (
        'peer | ours, samples/s | peer, samples/s | ratio (range) | CPU time | autoencoder | text encoder'
    )
    print(f'\n{what}\n\n| {headings} |\n|---|---|---|---|---|---|---|')
    for name in [*rows][1:]:
        print(peer_row(name, mine, rows[name], a.batch))
    reference = rows['reference loop']
    once = MIRRORED * statistics.median(parts['autoencoder'] for _, parts in reference) / EPOCHS
    together = statistics.median(theirs[0] / (ours[0] + once) for theirs, ours in zip(reference, mine))
    print(f'\nOurs with its encoding, {MIRRORED} per picture, spread over {EPOCHS} epochs:', end=' ')
    print(f'{together:.2f} times the reference loop')
    if len(rows) < 3:
        print('Stock diffusers was not run: fetch https://github.com/huggingface/diffusers')
        print('and give its folder with --diffusers')


if __name__ == '__main__':
    if sys.argv[1:2] != ['--drive']:
        main()
    elif sys.argv[2] == 'stock':
        drive_stock(sys.argv[3], sys.argv[4:])
    else:
        drive_reference(Path(sys.argv[3]), int(sys.argv[4]))
